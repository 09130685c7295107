"""t-of-n secret sharing over the field of p = 2**256 + 297 elements (Shamir 1979).

The prime lies above 2**256, so that every 32-byte secret is a field element. A share's abscissa is never sent: it is
the holder's number plus one, known to everyone, so a share cannot be moved to another index. With more shares than the
threshold, wrong ones are found and their holders named (Gao 2003, "A new algorithm for decoding Reed-Solomon codes").
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from itertools import combinations, zip_longest

from secagg.errors import LocalProtocolError, RemoteProtocolError
from secagg.prg import Entropy

PRIME = 2**256 + 297
SECRET_BYTES = 32
SHARE_BYTES = 33
# 40 bytes leave a bias below 2**-63 when reduced modulo the 257-bit prime.
_COEFFICIENT_BYTES = 40


def split(secret: bytes, threshold: int, holders: Collection[int], entropy: Entropy) -> dict[int, bytes]:
    """Share a secret so that any `threshold` holders can recover it and fewer learn nothing.

    Args:
        secret: 32 bytes.
        threshold: t, from 2 to the number of holders.
        holders: Distinct participants' numbers, each at least 0; holder v gets the polynomial's value at v + 1.
        entropy: Randomness for the t - 1 coefficients.

    Returns:
        A 33-byte big-endian share for each holder.

    Raises:
        LocalProtocolError: A secret of another length, a threshold out of range, holders that repeat.
    """
    if len(secret) != SECRET_BYTES:
        raise LocalProtocolError(f"a shared secret has {SECRET_BYTES} bytes, got {len(secret)}")
    _check_holders(holders)
    if not 2 <= threshold <= len(holders):
        raise LocalProtocolError(f"the threshold must be 2 to {len(holders)} (the number of holders), got {threshold}")
    coefficients = [int.from_bytes(secret, "big")]
    coefficients += [int.from_bytes(entropy(_COEFFICIENT_BYTES), "big") % PRIME for _ in range(threshold - 1)]
    return {v: _evaluate(coefficients, v + 1).to_bytes(SHARE_BYTES, "big") for v in holders}


def recover(
    shares: Mapping[int, bytes], threshold: int, is_secret: Callable[[bytes], bool]
) -> tuple[bytes, frozenset[int]]:
    """The secret behind the shares, proven right by `is_secret`, and the holders whose shares do not fit.

    Args:
        shares: Holder's number to 33-byte share; at least `threshold` of them.
        threshold: t, as in `split`.
        is_secret: Whether a candidate is the secret: its public key or its commitment matches.

    Returns:
        The 32-byte secret, and the numbers of the holders whose shares do not fit (empty when all agree). Either they
        lied, or the one whose secret it is gave them such shares.

    Raises:
        RemoteProtocolError: The shares do not lead to the secret. Never a wrong secret.
        LocalProtocolError: Too few shares, or numbers below 0.
    """
    _check_holders(shares)
    if len(shares) < threshold:
        raise LocalProtocolError(f"{threshold} shares are needed, got {len(shares)}")
    points: dict[int, int] = {}
    for holder, share in shares.items():
        value = int.from_bytes(share, "big") if len(share) == SHARE_BYTES else PRIME
        if value < PRIME:
            points[holder + 1] = value
    for coefficients in _candidates(points, threshold):
        secret = coefficients[0]
        if secret < 1 << 256 and is_secret(secret.to_bytes(SECRET_BYTES, "big")):
            misfits = _misfits(points, threshold, coefficients) | {v for v in shares if v + 1 not in points}
            return secret.to_bytes(SECRET_BYTES, "big"), frozenset(misfits)
    raise RemoteProtocolError(
        f"{len(shares)} shares of threshold {threshold} do not lead to the secret that was committed to: "
        "too many of them are wrong to tell whose, or the sharer's own commitment is"
    )


def _misfits(points: Mapping[int, int], threshold: int, coefficients: list[int]) -> set[int]:
    """Holders whose points are off the polynomial, given one whose value at 0 is proven.

    Liars can bend the polynomial and keep the secret. With the secret as one more true point the right polynomial is
    told from theirs while they are few enough; beyond that nobody is named, rather than the wrong ones.
    """
    if any(_evaluate(coefficients, x) != y for x, y in points.items()):
        decoded = _decode({0: coefficients[0], **points}, threshold)
        if decoded is None:
            return set()
        coefficients = decoded
    return {x - 1 for x, y in points.items() if _evaluate(coefficients, x) != y}


def _candidates(points: Mapping[int, int], threshold: int) -> list[list[int]]:
    """Polynomials of degree below the threshold that most of the points lie on, the likeliest first."""
    if len(points) < threshold:
        return []
    xs = tuple(sorted(points))
    first = _interpolate({x: points[x] for x in xs[:threshold]})
    if all(_evaluate(first, x) == points[x] for x in xs[threshold:]):
        return [first]
    if len(xs) - threshold == 1:
        # One surplus share shows that one is wrong, and the secret's own check shows which.
        return [_interpolate({x: points[x] for x in subset}) for subset in combinations(xs, threshold)]
    decoded = _decode(points, threshold)
    return [first] if decoded is None else [decoded, first]


def _decode(points: Mapping[int, int], threshold: int) -> list[int] | None:
    """The polynomial that all but half of the surplus points lie on, if there is one (Gao 2003, algorithm 1)."""
    xs = tuple(points)
    before, now = _vanishing(xs), _interpolate(points)
    previous, locator = [0], [1]
    while 2 * (len(_trimmed(now)) - 1) >= len(xs) + threshold:
        quotient, rest = _divide(before, _trimmed(now))
        before, now = now, rest
        previous, locator = locator, _subtract(previous, _multiply(quotient, locator))
    quotient, rest = _divide(now, _trimmed(locator))
    return None if any(rest) or len(_trimmed(quotient)) > threshold else quotient


def _divide(dividend: list[int], divisor: list[int]) -> tuple[list[int], list[int]]:
    """Quotient and remainder of polynomials, lowest coefficient first; the divisor's highest is not zero."""
    rest = list(dividend)
    degree = len(divisor) - 1
    inverse = pow(divisor[-1], -1, PRIME)
    quotient = [0] * max(1, len(rest) - degree)
    for k in range(len(rest) - degree - 1, -1, -1):
        quotient[k] = rest[k + degree] * inverse % PRIME
        for j, coefficient in enumerate(divisor):
            rest[k + j] = (rest[k + j] - quotient[k] * coefficient) % PRIME
    return quotient, rest[:degree] or [0]


def _multiply(a: list[int], b: list[int]) -> list[int]:
    product = [0] * (len(a) + len(b) - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            product[i + j] = (product[i + j] + x * y) % PRIME
    return product


def _subtract(a: list[int], b: list[int]) -> list[int]:
    return [(x - y) % PRIME for x, y in zip_longest(a, b, fillvalue=0)]


def _trimmed(polynomial: list[int]) -> list[int]:
    """Without leading zeros; the zero polynomial keeps one."""
    size = len(polynomial)
    while size > 1 and not polynomial[size - 1]:
        size -= 1
    return polynomial[:size]


def _vanishing(xs: tuple[int, ...]) -> list[int]:
    """The monic polynomial that is zero at all abscissas."""
    product = [1]
    for x in xs:
        product = [(low - x * high) % PRIME for low, high in zip([0, *product], [*product, 0], strict=True)]
    return product


def _interpolate(points: Mapping[int, int]) -> list[int]:
    """Coefficients of the polynomial through the points, lowest first."""
    xs = tuple(points)
    total = [0] * len(xs)
    for x, basis in zip(xs, _lagrange_basis(xs), strict=True):
        for k, coefficient in enumerate(basis):
            total[k] += points[x] * coefficient
    return [value % PRIME for value in total]


@lru_cache(maxsize=8)
def _lagrange_basis(xs: tuple[int, ...]) -> list[list[int]]:
    """Each abscissa's Lagrange polynomial; the same set of holders answers for every secret of a round."""
    product, basis = _vanishing(xs), []
    for x in xs:
        quotient, _ = _divide(product, [-x % PRIME, 1])
        scale = pow(_evaluate(quotient, x), -1, PRIME)
        basis.append([scale * coefficient % PRIME for coefficient in quotient])
    return basis


def _evaluate(coefficients: list[int], x: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * x + coefficient) % PRIME
    return value


def _check_holders(holders: Collection[int]) -> None:
    if len(set(holders)) != len(holders) or any(v < 0 for v in holders):
        raise LocalProtocolError(f"holders must be distinct numbers from 0, got {sorted(holders)}")
