"""Homomorphic summation with CKKS ciphertexts under a joint key that nobody holds.

`params` finds the parameters, `client` and `server` have the steps of each role, `messages` what they
say to each other.
"""
