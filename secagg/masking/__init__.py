"""Pairwise-masked secure aggregation with drop-out recovery, secure against an active server.

Bonawitz, Ivanov, Kreuter, Marcedone, McMahan, Patel, Ramage, Segal, Seth: "Practical secure aggregation for
privacy-preserving machine learning", CCS 2017. `client` and `server` hold the steps, `params` what is pinned,
`messages` what is sent.
"""
