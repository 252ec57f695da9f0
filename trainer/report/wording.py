"""The texts, for people, of a run's events."""

from __future__ import annotations

import math
from typing import Any, Callable, Dict, List, Mapping, Optional

Figures = Mapping[str, Any]


def text(event: str, figures: Figures) -> str:
    """The event in words; empty for events that are not shown."""
    return _TEXTS[event](figures)


def finite(figures: Figures) -> Dict[str, Any]:
    """The figures for JSON, which knows no NaN and no infinity: these become null."""
    lost = {n for n, v in figures.items() if isinstance(v, float) and not math.isfinite(v)}
    return {**figures, **dict.fromkeys(lost)}


def of_ranks(ranks: int) -> str:
    """``1 rank``, ``2 ranks``."""
    return _counted(ranks, "rank")


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def minutes(seconds: float) -> str:
    """``6:05`` for 365 seconds, ``60:00`` for an hour."""
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02}"


def _begin(f: Figures) -> str:
    share = f["global_batch_size"] / f["ranks"]
    lines = [
        f"{f['folder']}: {_sets(f)} images, "
        f"{_counted(f['epochs'], 'epoch')} of {_counted(f['steps_per_epoch'], 'step')}",
        f"{of_ranks(f['ranks'])} on {f['device']}, global batch {f['global_batch_size']}, "
        f"{share:g} per rank, batch norm {f['batch_norm']}; MXNet {f['mxnet']}",
    ]
    if f.get("ema"):
        lines.append(f"evaluates, saves and returns the weights' moving average (ema {f['ema']})")
    if f["resumed_from"]:
        lines.append(f"resumes from {f['resumed_from']}")
        if f["first_step"] >= f["last_step"]:
            lines[-1] += (
                ", the end of the run: no step is left to train. To train anew, give another "
                'name=... or --resume none (in Python resume="none")'
            )
    if f["first_step"] < f["last_step"]:
        lines.append("starting: the first step, which compiles the net")
    return "\n".join(lines)


def _sets(f: Figures) -> str:
    """``900 training, 100 validation and 500 test``."""
    names = ("training", "validation", "test")
    counted = [(f.get(f"{name}_samples"), name) for name in names]
    *first, last = [f"{count} {name}" for count, name in counted if count is not None]
    return f"{', '.join(first)} and {last}" if first else last


def _step(f: Figures) -> str:
    place = f"epoch {f['epoch']}/{f['epochs']}"
    figures = f"{place}  loss {f['loss']:.4f}  accuracy {f['accuracy']:.4f}"
    if f.get("skipped_steps"):
        figures += f"  loss scale {f['loss_scale']:g} ({f['skipped_steps']:g} steps skipped)"
    return figures + _speed("  ", f["images_per_second"])


def _epoch(f: Figures) -> str:
    figures = f"epoch {f['epoch']}: training loss {f['loss']:.4f}  accuracy {f['accuracy']:.4f}"
    bad = f.get("skipped_samples")
    return figures + (f"  ({_counted(bad, 'bad sample')} skipped)" if bad else "")


_ABOUT = ("event", "time", "step", "set", "samples")  # all else are figures


def _evaluation(f: Figures) -> str:
    figures = "  ".join(f"{name} {value:.4f}" for name, value in f.items() if name not in _ABOUT)
    return f"{f['set']} {figures}  ({f['samples']} images)"


def _end(f: Figures) -> str:
    if f["state"] == "stopped":
        lines = [f"stopped at step {f['step']} of {f['last_step']}, as asked; saved"]
    else:
        early = f"stopped early at step {f['step']} of {f['last_step']} (train.patience)"
        how = early if f["state"] == "stopped early" else "done"
        lines = [
            f"{how}: {_accuracy(f)}{minutes(f['seconds'])} minutes"
            + _speed(", ", f["images_per_second"])
        ]
    # A stopped run goes on from the newest; what is done with a model takes the best.
    kept = None if f["state"] == "stopped" else f["best_checkpoint"]
    places = {"checkpoint": kept or f["checkpoint"], "events": f["events"]}
    return "\n".join(lines + _aligned({**places, **f["next"]}))


def _accuracy(f: Figures) -> str:
    """How good the net is at the end; a best that the test set chose looks better than it is."""
    if f["accuracy"] is None:
        return ""
    best, chosen = f["best_accuracy"], ", chosen on the test set" * (f.get("set") == "test")
    beside = "" if best is None else f" (best {best:.4f}{chosen})"
    test = f.get("test_accuracy")
    after = "" if test is None else f"test accuracy {test:.4f}, "
    return f"{f.get('set') or 'test'} accuracy {f['accuracy']:.4f}{beside}, {after}"


def _speed(before: str, speed: Optional[float]) -> str:
    return "" if speed is None else f"{before}{speed:.0f} images/s"


def _aligned(rows: Mapping[str, Optional[str]]) -> List[str]:
    width = max(map(len, rows)) + 1
    return [f"{name + ':':{width}} {value}" for name, value in rows.items() if value]


_TEXTS: Dict[str, Callable[[Figures], str]] = {
    "begin": _begin,
    "step": _step,
    "epoch": _epoch,
    "evaluation": _evaluation,
    "checkpoint": lambda figures: "",
    "warning": lambda figures: f"warning: {figures['message']}",
    "end": _end,
}

EVENTS = tuple(_TEXTS)
"""The events that :func:`text` knows."""
