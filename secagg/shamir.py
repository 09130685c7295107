"""t-of-n secret sharing over the field of p = 2**256 + 297 elements (Shamir 1979).

The prime lies above 2**256, so that every 32-byte secret is a field element. A share's abscissa is never sent: it is
the holder's number plus one, known to everyone, so a share cannot be moved to another index. With more shares than the
threshold, wrong ones are found and their holders named (Welch and Berlekamp 1986).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from itertools import combinations

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
    """The secret behind the shares, proven right by `is_secret`, and the holders whose shares were wrong.

    Args:
        shares: Holder's number to 33-byte share; at least `threshold` of them.
        threshold: t, as in `split`.
        is_secret: Whether a candidate is the secret: its public key or its commitment matches.

    Returns:
        The 32-byte secret, and the numbers of the holders that lied (empty when all agree).

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
            good = {x - 1 for x, y in points.items() if _evaluate(coefficients, x) == y}
            return secret.to_bytes(SECRET_BYTES, "big"), frozenset(shares.keys() - good)
    raise RemoteProtocolError(
        f"{len(shares)} shares of threshold {threshold} do not lead to the secret that was committed to: "
        "too many of them are wrong to tell whose, or the sharer's own commitment is"
    )


def _candidates(points: Mapping[int, int], threshold: int) -> list[list[int]]:
    """Polynomials of degree below the threshold that most of the points lie on, the likeliest first."""
    if len(points) < threshold:
        return []
    xs = tuple(sorted(points))
    first = _interpolate({x: points[x] for x in xs[:threshold]})
    if all(_evaluate(first, x) == points[x] for x in xs[threshold:]):
        return [first]
    found = [first]
    for wrong in range((len(xs) - threshold) // 2, 0, -1):
        decoded = _welch_berlekamp(points, threshold, wrong)
        if decoded is not None:
            found.append(decoded)
            break
    # One liar may hide where there is one surplus share only: leave each out in turn.
    if len(xs) - threshold == 1:
        found += [_interpolate({x: points[x] for x in subset}) for subset in combinations(xs, threshold)]
    return found


def _welch_berlekamp(points: Mapping[int, int], threshold: int, wrong: int) -> list[int] | None:
    """Decode with at most `wrong` wrong points: solve Q(x) = y E(x), E monic of degree `wrong`; the answer is Q / E."""
    size = threshold + wrong
    rows = []
    for x, y in points.items():
        row = [pow(x, k, PRIME) for k in range(size)] + [-y * pow(x, k, PRIME) % PRIME for k in range(wrong)]
        rows.append([*row, y * pow(x, wrong, PRIME) % PRIME])
    solution = _solve(rows, size + wrong)
    if solution is None:
        return None
    quotient, remainder = _divide(solution[:size], [*solution[size:], 1])
    return quotient if not any(remainder) else None


def _solve(rows: list[list[int]], unknowns: int) -> list[int] | None:
    """Gauss-Jordan over the field; free unknowns are zero, contradictory rows give None."""
    pivots: list[int] = []
    for column in range(unknowns):
        rank = len(pivots)
        pivot = next((r for r in range(rank, len(rows)) if rows[r][column]), None)
        if pivot is None:
            continue
        rows[rank], rows[pivot] = rows[pivot], rows[rank]
        inverse = pow(rows[rank][column], -1, PRIME)
        rows[rank] = [value * inverse % PRIME for value in rows[rank]]
        for r, row in enumerate(rows):
            if r != rank and row[column]:
                factor = row[column]
                rows[r] = [(a - factor * b) % PRIME for a, b in zip(row, rows[rank], strict=True)]
        pivots.append(column)
    if any(row[-1] for row in rows[len(pivots) :]):
        return None
    solution = [0] * unknowns
    for rank, column in enumerate(pivots):
        solution[column] = rows[rank][-1]
    return solution


def _divide(dividend: list[int], divisor: list[int]) -> tuple[list[int], list[int]]:
    """Polynomial division by a monic divisor, lowest coefficient first."""
    rest = list(dividend)
    degree = len(divisor) - 1
    quotient = [0] * (len(rest) - degree)
    for k in range(len(quotient) - 1, -1, -1):
        quotient[k] = rest[k + degree]
        for j, coefficient in enumerate(divisor):
            rest[k + j] = (rest[k + j] - quotient[k] * coefficient) % PRIME
    return quotient, rest[:degree]


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
    product = [1]
    for x in xs:
        product = [(low - x * high) % PRIME for low, high in zip([0, *product], [*product, 0], strict=True)]
    basis = []
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
