"""The commands `fastcompat backfill plan|run|status|verify`."""

from __future__ import annotations

import multiprocessing
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from ..serving.gallery import MixedGallery
from ..serving.job import SET_ASIDE, Job, plan, prepare, set_aside, work
from .terminal import fail

app = typer.Typer(
    no_args_is_help=True,
    help="Re-embed a gallery as a job: resumed by being run again.\n\n"
    "Exit codes: 0 done or sound, 1 damaged or failed, 2 wrong arguments, 3 items are left or set aside, "
    "130 interrupted.",
)

LEFT, INTERRUPTED = 3, 130

Folder = Annotated[Path, typer.Argument(help="The gallery's folder, format 2.")]
Encoder = Annotated[str, typer.Option(help="`package.module:function`; called with ids, returns [M, D].")]
Model = Annotated[str | None, typer.Option(help="The newest model's name; begun where it is new.")]
Order = Annotated[str, typer.Option(help="`random`, `uncertainty`, `demand`, or an .npy file of ids.")]
Batch = Annotated[int, typer.Option(min=1, help="Items that are embedded and committed at once.")]
Rate = Annotated[float, typer.Option(min=0, help="Items a second at most; 0: no limit.")]
Queries = Annotated[Path | None, typer.Option(help="Old query vectors, .npy, for `--order demand`.")]
Weight = Annotated[Path | None, typer.Option(help="[C, D_old], .npy, for `--order uncertainty`.")]


class _Stop:
    """Set by Ctrl-C and SIGTERM: the batch under way is committed, then the work ends."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True

    def __call__(self) -> bool:
        return self.asked


@app.command("plan")
def plan_(
    folder: Folder,
    encoder: Encoder,
    model: Model = None,
    order: Order = "random",
    batch: Batch = 1024,
    rate: Rate = 0.0,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    queries: Queries = None,
    class_weight: Weight = None,
    price_per_item: Annotated[float, typer.Option(min=0, help="Money that embedding an item costs.")] = 0.0,
) -> None:
    """Time a sample and say what the backfill will take; writes nothing."""
    job = Job(folder, encoder, model, order, batch, rate, 0, queries, class_weight)
    found = _tried(lambda: plan(job))
    hours = found["seconds"] / 3600 / (workers if not rate else 1)
    typer.echo(f"items:  {found['items']:,.0f} to embed")
    typer.echo(f"bytes:  {found['bytes']:,.0f} to write")
    typer.echo(f"hours:  {hours:.2f} with {workers} worker(s), from {found['sample']:.0f} items timed now")
    if price_per_item:
        typer.echo(f"money:  {found['items'] * price_per_item:,.2f}")


@app.command()
def run(
    folder: Folder,
    encoder: Encoder,
    model: Model = None,
    order: Order = "random",
    batch: Batch = 1024,
    rate: Rate = 0.0,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    retries: Annotated[int, typer.Option(min=0, help="How often a batch that raised is tried again.")] = 3,
    queries: Queries = None,
    class_weight: Weight = None,
) -> None:
    """Embed what is left, a random sample of 1,000 first; stops cleanly, and goes on when it is run again.

    A batch that raises is tried again, then in halves; single items that keep failing are set aside in the
    folder's `set-aside.jsonl` and not tried again until their lines are removed.
    """
    job = Job(folder, encoder, model, order, batch, rate, retries, queries, class_weight)
    stop = _Stop()
    name = _tried(lambda: prepare(job))
    begun = _tried(lambda: MixedGallery.open(folder))
    left = _left(begun)
    start = time.monotonic()
    failed = False
    if workers == 1:
        done = 0
        for some in _lazily(lambda: work(job, name, (0, 1), stop)):
            done += some
            _progress(begun, left, done, start)
    else:
        failed = _workers(job, name, workers, stop, begun, left, start)
    begun.refresh()
    aside = [item for item in set_aside(folder) if item["id"] in set(begun.pending().tolist())]
    _progress(begun, left, left - _left(begun), start, last=True)
    if aside:
        typer.echo(
            f"{len(aside)} items set aside, listed in {folder / SET_ASIDE}; first: {aside[0]['error']}"
        )
    if failed:
        typer.echo("error: a worker failed; run the command again to go on", err=True)
        raise typer.Exit(1)
    if stop.asked:
        typer.echo("interrupted; run the command again to go on")
        raise typer.Exit(INTERRUPTED)
    if _left(begun):
        raise typer.Exit(LEFT)


@app.command()
def status(folder: Folder) -> None:
    """Say how far the backfill is; reads while it runs."""
    with _tried(lambda: MixedGallery.open(folder)) as gallery:
        left = gallery.pending()
        aside = [item for item in set_aside(folder) if item["id"] in set(left.tolist())]
        typer.echo(f"models:    {', '.join(gallery.models)}")
        typer.echo(f"items:     {len(gallery):,}")
        typer.echo(f"fraction:  {gallery.fraction:.4f}")
        typer.echo(f"left:      {len(left):,}, {len(aside):,} of them set aside")
        for item in aside[:10]:
            typer.echo(f"  {item['id']}: {item['error']}")
        if len(left):
            raise typer.Exit(LEFT)


@app.command()
def verify(folder: Folder) -> None:
    """Check every byte of the gallery; names what is damaged."""
    with _tried(lambda: MixedGallery.open(folder)) as gallery:
        found = gallery.verify()
    for one in found:
        typer.echo(one)
    typer.echo(f"{len(found)} damages" if found else "sound")
    if found:
        raise typer.Exit(1)


def _left(gallery: MixedGallery) -> int:
    """How many items do not count with the newest model yet."""
    return round((1 - gallery.fraction) * len(gallery))


def _tried(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except (ValueError, TypeError, OSError) as error:
        fail(str(error))


def _lazily(call: Callable[[], Any]) -> Any:
    """A generator whose refusals end the command."""
    steps = call()
    while True:
        try:
            yield next(steps)
        except StopIteration:
            return
        except (ValueError, TypeError, OSError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None


def _workers(
    job: Job, name: str, count: int, stop: _Stop, gallery: MixedGallery, left: int, start: float
) -> bool:
    """Run the shares in processes; whether one failed."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_work, args=(job, name, (i, count))) for i in range(count)]
    for process in processes:
        process.start()
    told = False
    while any(process.is_alive() for process in processes):
        time.sleep(0.2)
        gallery.refresh()
        _progress(gallery, left, left - _left(gallery), start)
        if stop.asked and not told:
            told = True
            for process in processes:
                with suppress(OSError, AttributeError):
                    process.terminate()
    return not stop.asked and any(process.exitcode for process in processes)


def _work(job: Job, name: str, share: tuple[int, int]) -> None:
    for _ in work(job, name, share, _Stop()):
        pass


def _progress(gallery: MixedGallery, left: int, done: int, start: float, *, last: bool = False) -> None:
    """One line, written over by the next."""
    took = time.monotonic() - start
    speed = done / took if took > 0 else 0.0
    gallery.refresh()
    eta = _clock((left - done) / speed) if speed else "?"
    rest = "" if last else f", {eta} to go"
    line = f"{100 * gallery.fraction:6.2f} % of {len(gallery):,} items, {speed:,.0f} items/s{rest}"
    typer.echo("\r" + line.ljust(min(78, shutil.get_terminal_size().columns - 1)), nl=last)


def _clock(seconds: float) -> str:
    minutes = int(seconds // 60)
    return f"{minutes // 60}:{minutes % 60:02}:{int(seconds % 60):02}"
