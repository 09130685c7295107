"""The command `secagg budget attack`: is the account of a study's privacy contradicted by an attack?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from protocols.attack import Attack

_DECIDES = """\
What decides is whether the one-run bound is above the account, or the account's own trade-off function is ruled out.
The f-DP bound is the account that a Gaussian mechanism would need. The ideal attack is the median one, simulated, on
noise and sampling exactly as claimed."""
_CONSISTENT = """\
A low bound does not show that the account is true: a weak attack gives one for any account, and so does a fault that
the canaries do not meet. It shows that this attack, of this size, found nothing that the account does not allow."""
_CONTRADICTS = """\
This attacker guessed better than the account allows: noise, sampling, clipping or the account itself is not as it
should be."""
_TOO_SMALL = """\
This attack could not have contradicted the account even with every guess right. Raise --canaries or --guesses."""


def attack(
    study: Annotated[Path, typer.Argument(metavar="STUDY.TOML", help="The study file.", show_default=False)],
    site: Annotated[str | None, typer.Option("--site", metavar="NAME", help="Whose rows to train on.")] = None,
    canaries: Annotated[int | None, typer.Option("--canaries", metavar="M", help="Coins to toss; 5000.")] = None,
    guesses: Annotated[
        int | None, typer.Option("--guesses", metavar="R", help="Coins to guess; a fifth of the canaries.")
    ] = None,
    significance: Annotated[
        float, typer.Option("--significance", metavar="S", help="Chance of contradicting a true account.")
    ] = 0.05,
    json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON and nothing else.")] = False,
) -> None:
    """Attack the account of a study with local DP-SGD: train at one site with canaries, and guess which were there.

    Prints lower bounds on epsilon beside the account. Exits with 5 where they contradict it.
    """
    import msgspec

    from dp import DpError
    from protocols.attack import CANARIES, attack_study
    from protocols.cli import Exit, fail
    from protocols.run import load_data
    from protocols.study import load_study
    from secagg.errors import SecAggError

    try:
        loaded = load_study(study)
        found = attack_study(
            loaded,
            load_data(loaded, study.parent),
            site=site,
            canaries=CANARIES if canaries is None else canaries,
            guesses=guesses,
            significance=significance,
        )
    except (SecAggError, DpError) as error:
        fail(error, Exit.BAD_INPUT)
    if json:
        verdict = "contradicts" if found.audit.contradicts else "consistent with"
        told = {"verdict": verdict, "could_contradict": found.best.contradicts, **msgspec.to_builtins(found)}
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(told)) + b"\n")
    else:
        _print(found)
    if found.audit.contradicts:
        fail(f"the attack on {found.site} contradicts the account of {study}", Exit.UNPROVEN)


def _print(found: Attack) -> None:
    from rich.console import Console
    from rich.table import Table

    screen, audit, ideal = Console(), found.audit, found.ideal
    account = audit.account

    def say(text: str) -> None:
        screen.print(text, highlight=False, markup=False, soft_wrap=True)

    say(
        f"{found.study}, site {found.site}: {audit.canaries} canaries beside {found.train_rows} training rows, "
        f"{found.rounds} rounds of {found.steps // found.rounds} steps of DP-SGD.\n"
        f"{audit.right} of {audit.guesses} guesses were right; in an ideal attack on this account, {ideal.right}.\n"
    )
    table = Table(box=None, pad_edge=False)
    for heading in (f"epsilon at delta {account.delta:g}", "attack", "ideal attack"):
        table.add_column(heading, justify="left" if heading.startswith("epsilon") else "right")
    table.add_row("at least, by one run", f"{audit.one_run:.3f}", f"{ideal.one_run:.3f}")
    table.add_row("at least, by f-DP (Gaussian)", f"{audit.f_dp:.3f}", f"{ideal.f_dp:.3f}")
    table.add_row(f"account ({account.relation})", f"{account.epsilon:.3f}", "")
    screen.print(table, highlight=False)
    verdict = "contradicts" if audit.contradicts else "is consistent with"
    say(
        f"\nThe attack {verdict} the account. The chance of contradicting a true one is at most {audit.significance:g}."
        f"\n{_DECIDES}"
    )
    if audit.contradicts:
        say(_CONTRADICTS)
        return
    say(_CONSISTENT)
    if not found.best.contradicts:
        say(_TOO_SMALL)
