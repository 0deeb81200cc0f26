"""Pictures of a study: rates over a count, accuracy over attack, masks."""

from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.figure import Figure
import numpy as np

from experiments import pictures

Interval = tuple[float, float, float]
"""Value, lower and upper end, in [0, 1]."""


def over_count(
  series: Mapping[str, Sequence[tuple[float, Interval]]],
  controls: Mapping[str, str],
  *,
  xlabel: str,
) -> bytes:
  """Draws attack success against a count, a line a method.

  Args:
    series: by method, a rate at each count.
    controls: what points of reference are called, which are drawn dashed.
    xlabel: of the horizontal axis.

  Returns:
    A PNG file.
  """
  with matplotlib.rc_context(pictures.STYLE):
    figure = Figure(figsize=(6.4, 3.8))
    axes = figure.subplots()
    colours = _colours([name for name in series if name not in controls])
    for i, (name, points) in enumerate(series.items()):
      points = sorted(points)
      x = np.array([p[0] for p in points])
      y, low, high = 100 * np.array([p[1] for p in points]).T
      x = x + 0.03 * (i - len(series) / 2)  # intervals side by side
      axes.errorbar(
        *(x, y),
        yerr=[y - low, high - y],
        color=colours.get(name, pictures.MUTED),
        ls='--' if name in controls else '-',
        marker='D' if name in controls else 'o',
        mfc='white' if name in controls else None,
        ms=5,
        lw=1.4,
        elinewidth=1,
        label=controls.get(name, name),
      )
    axes.set_xticks(sorted({p[0] for s in series.values() for p in s}))
    axes.set_ylim(-3, 103)
    axes.set_xlabel(xlabel)
    axes.set_ylabel('attack success rate, %')
    _legend(figure, axes)
    return pictures.png(figure)


def trade_off(
  points: Sequence[tuple[float, Interval, Interval]],
  marks: Mapping[str, tuple[Interval, Interval]],
) -> bytes:
  """Draws accuracy against attack success along a weight.

  Args:
    points: weight, ACC and ASR.
    marks: ACC and ASR of what it is compared with, by what it is called.

  Returns:
    A PNG file.
  """
  with matplotlib.rc_context(pictures.STYLE):
    figure = Figure(figsize=(6.4, 4.2))
    axes = figure.subplots()
    points = sorted(points)
    line = [(100 * asr[0], 100 * acc[0]) for _, acc, asr in points]
    axes.plot(*zip(*line, strict=True), color='#0072B2', lw=1.4, zorder=2)
    for weight, acc, asr in points:
      _cross(axes, acc, asr, '#0072B2', 'o')
      _beside(axes, acc, asr, f'{weight:g}', pictures.INK)
    for name, (acc, asr) in marks.items():
      _cross(axes, acc, asr, pictures.MUTED, 'D')
      _beside(axes, acc, asr, name, pictures.MUTED)
    axes.set_xlabel('attack success rate, % — lower is safer')
    axes.set_ylabel('clean accuracy, % (mean of all tasks)')
    axes.margins(0.12)
    return pictures.png(figure)


def _cross(axes, acc: Interval, asr: Interval, colour: str, marker: str):
  x, y = 100 * np.array(asr), 100 * np.array(acc)
  axes.plot(x[1:], [y[0]] * 2, color=colour, lw=1, alpha=0.4)
  axes.plot([x[0]] * 2, y[1:], color=colour, lw=1, alpha=0.4)
  axes.plot(x[0], y[0], marker=marker, color=colour, ms=6, mec='white')


def _beside(axes, acc: Interval, asr: Interval, text: str, colour: str):
  axes.annotate(
    text,
    (100 * asr[0], 100 * acc[0]),
    xytext=(6, 5),
    textcoords='offset points',
    fontsize=8,
    color=colour,
  )


def sparsity(methods: Mapping[str, Mapping[str, Mapping[str, float]]]) -> bytes:
  """Draws what share of each part of the model the masks drop.

  Args:
    methods: by method and mask, the share in [0, 1] by part, in order.

  Returns:
    A PNG file.
  """
  columns = min(3, len(methods))
  rows = -(-len(methods) // columns)
  with matplotlib.rc_context(pictures.STYLE):
    figure = Figure(figsize=(2.7 * columns + 0.4, 2.2 * rows + 0.6))
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    names = list(dict.fromkeys(m for masks in methods.values() for m in masks))
    for axes, (method, masks) in zip(grid, methods.items(), strict=False):
      for mask, shares in masks.items():
        colour = pictures.TASK_COLOURS[names.index(mask)]
        values = [100 * x for x in shares.values()]
        axes.plot(values, marker='o', ms=3.5, color=colour, label=mask)
        ticks = range(len(shares))
        axes.set_xticks(ticks, list(shares), rotation=60, fontsize=7)
      axes.set_title(method)
      axes.legend()
    for axes in grid[len(methods) :]:
      axes.set_visible(False)
    for axes in grid[::columns]:
      axes.set_ylabel('dropped, %')
    figure.tight_layout()
    return pictures.png(figure)


def _colours(names: Sequence[str]) -> dict[str, str]:
  """Returns a colour a method, families in their own where these differ."""
  usual = [pictures.colour(name) for name in names]
  if len(set(usual)) == len(usual):
    return dict(zip(names, usual, strict=True))
  wheel = pictures.TASK_COLOURS
  return {name: wheel[i % len(wheel)] for i, name in enumerate(names)}


def _legend(figure: Figure, axes) -> None:
  figure.subplots_adjust(right=0.7)
  axes.legend(loc='center left', bbox_to_anchor=(1.01, 0.5))
