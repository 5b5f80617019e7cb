"""What the demonstration says: its table, its picture, and in plain words what the numbers mean."""

from __future__ import annotations

import math

from matplotlib.figure import Figure

from fastcompat.commands import report
from fastcompat.demo.data import DIGITS
from fastcompat.demo.upgrade import Upgrade

HEADER = (
    "model",
    "self mAP",
    "self top-1",
    "cross mAP",
    "cross top-1",
    "update gain",
    "lost at 0 %",
    "lost at 100 %",
    "lost mean",
    "area mAP",
    "area top-1",
    "per query",
)


def table(found: Upgrade) -> list[tuple[str, ...]]:
    """The rows of the result, header first, as text."""
    rows = [HEADER, ("old", f"{found.old.map:.3f}", f"{found.old.top1:.3f}", *["-"] * 8, "1 model")]
    for new in found.candidates:
        flips, cross = new.curve.negative_flips, new.cross_test
        # Between unrelated spaces the cross test says nothing: it is shown in brackets.
        mark = "({:.3f})" if new.both else "{:.3f}"
        rows.append(
            (
                new.name,
                f"{new.self_test.map:.3f}",
                f"{new.self_test.top1:.3f}",
                mark.format(cross.map),
                mark.format(cross.top1),
                "-" if math.isnan(new.gain) else f"{new.gain:+.0%}",
                f"{float(flips[0]):.1%}",
                f"{float(flips[-1]):.1%}",
                f"{float(flips.mean()):.1%}",
                f"{new.curve.auc('map'):.3f}",
                f"{new.curve.auc('cmc@1'):.3f}",
                "2 models" if new.both else "1 model",
            )
        )
    return rows


def notes(found: Upgrade) -> list[tuple[str, str]]:
    """(heading, explanation) pairs: how to read the table, then what it cannot show."""
    alone = next(new for new in found.candidates if new.both)
    verdicts = "; ".join(
        f"{new.name} {'yes' if new.cross_test.map > found.old.map else 'no'} "
        f"({new.cross_test.map:.3f} against {found.old.map:.3f})"
        for new in found.candidates
        if not new.both
    )
    # Of a share p among n queries; at least one query either way, for a model that gets all right.
    error = max(math.sqrt(found.old.top1 * (1 - found.old.top1) / found.queries), 1 / found.queries)
    return [
        (
            "Self and cross test",
            "Self: queries and gallery embedded by the same model. Cross: the new model's queries against "
            "the gallery as the old model left it, which is what users get on the day the model is exchanged "
            "and nothing has been re-embedded. mAP looks at the whole ranking, top-1 at the first result.",
        ),
        (
            "Compatible?",
            "A new model counts as compatible if its cross test beats the old model's self test, in mAP: "
            f"{verdicts}. The update gain is how much of the independent model's improvement is there before "
            "any backfill; below zero, exchanging the model makes search worse.",
        ),
        (
            "The independent model",
            "It was trained without looking at the old one, so its cross test compares unrelated spaces: the "
            f"{alone.cross_test.map:.3f} in brackets means nothing (a random order gives about "
            f"{found.chance:.3f}). It can still serve a half-upgraded gallery if BOTH models embed every "
            "query: the old query searches the old items, the new query the re-embedded ones, and the two "
            "lists are merged by distance. That is the curve shown; its price is two extractions per query "
            "until the backfill is done.",
        ),
        (
            "BCT and RACT",
            "They were trained to agree with the old space, so one new query searches old and re-embedded "
            "items alike, and the old model can be switched off at once. Their curves start at the cross "
            "test and end at the self test; an end below the independent model's is the price of agreeing "
            "with an old model. BCT holds each image to its class's mean old feature (the old classifier, "
            "extended to classes the old model never saw), RACT to the old feature of the same image.",
        ),
        (
            "Lost (negative flips)",
            "Share of all queries whose first result was right under the old system and is wrong now. An "
            "average that rises can hide them, and they are what users complain about: no regret on average "
            "is not no regret for every query. The independent model starts at zero by construction: at 0 % "
            "it still is the old system.",
        ),
        (
            "Area and mean",
            f"Plain mean over {len(alone.curve.fraction)} states of the gallery, from 0 to 100 % re-embedded "
            "in one random order: what users get on average while the backfill runs.",
        ),
        _limit(found),
        (
            "How sure",
            f"One seed and {found.queries:,} queries: one query is {1 / found.queries:.1%}, and a top-1 "
            f"figure has a standard error of about {error:.1%}. Smaller differences than twice that need "
            "more seeds (`--seed`) before they mean anything. The training settings, and the form of BCT's "
            "old classifier, were chosen looking at seed 0 of digits and of Omniglot: another seed is the "
            "fairer test.",
        ),
    ]


def _limit(found: Upgrade) -> tuple[str, str]:
    if found.unseen:
        return (
            "What this data shows",
            "No model was trained on the classes judged, as in real search. RACT's new-to-new term is made "
            "for this case: over the backfill of Omniglot it lost about a quarter fewer queries than the "
            "same loss without that term, in each of three seeds. Whether RACT or BCT is ahead depends on "
            "the data and the seed.",
        )
    known = "Ten classes of 8 x 8 pixels, all of them" if found.data == DIGITS else "All classes judged were"
    return (
        "What this data cannot show",
        f"{known} known to the new models: only the images are new. So every new model is close to a "
        "classifier, and unseen classes, the hard part of real search, do not occur. RACT's new-to-new term, "
        "its own idea, gains nothing on digits, whatever RACT and BCT make of each other here; its gain "
        "(fewer lost queries) shows on Omniglot, judged on characters never trained on. For that, give "
        "`--data` a folder or zip with 30 classes or more.",
    )


def picture(found: Upgrade) -> Figure:
    """The curves of all new models."""
    judged = "classes" if found.unseen else "images"
    return report.figure(
        [report.Line(new.name, new.curve) for new in found.candidates],
        title="What users get while the gallery is being re-embedded",
        subtitle=f"{found.data}: {found.queries:,} queries, {judged} never trained on, seed {found.seed}",
        caption=(
            "BCT, RACT: trained to be compatible; the new model alone searches old and re-embedded items.\n"
            "independent: both models embed every query, and the two result lists are merged by distance."
        ),
        old_map=found.old.map,
    )
