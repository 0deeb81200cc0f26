"""Pictures of a merge: accuracy against attack, learning curves, triggers.

Each function returns the bytes of a PNG file. Colours are those of Okabe and
Ito, which colour-blind readers can tell apart.
"""

from collections.abc import Mapping, Sequence
import io
import textwrap
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
from matplotlib import patheffects
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
import numpy as np

from dam_jax import attacks

INK, MUTED, RULE = '#1d2733', '#67727e', '#d9dee3'
FAMILIES = {
  'dam_robust': '#0072B2',
  'dam_paper': '#CC79A7',
  'dam_released': '#D55E00',
  'concrete': '#009E73',
  'adamerging': '#56B4E9',
  '': '#67727e',
}
"""Colour by the beginning of a method's name."""

TASK_COLOURS = (
  '#0072B2',
  '#D55E00',
  '#009E73',
  '#CC79A7',
  '#E69F00',
  '#56B4E9',
  '#1d2733',
  '#8c6d31',
)

STYLE = {
  'font.family': 'sans-serif',
  'font.size': 9,
  'text.color': INK,
  'axes.edgecolor': RULE,
  'axes.labelcolor': INK,
  'axes.titlesize': 9,
  'axes.titlelocation': 'left',
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.grid': True,
  'axes.axisbelow': True,
  'grid.color': '#eef1f4',
  'grid.linewidth': 0.8,
  'xtick.color': MUTED,
  'ytick.color': MUTED,
  'xtick.labelsize': 8,
  'ytick.labelsize': 8,
  'legend.frameon': False,
  'legend.fontsize': 8,
}
"""Of all pictures."""


def colour(method: str) -> str:
  """Returns the colour of a method's family.

  Args:
    method: its name.

  Returns:
    A colour such as `'#0072B2'`.
  """
  return next(c for name, c in FAMILIES.items() if method.startswith(name))


def png(figure: Figure) -> bytes:
  """Returns a PNG file of a figure.

  Args:
    figure: drawn within `matplotlib.rc_context(STYLE)`.
  """
  out = io.BytesIO()
  # No software version or date: the same numbers give the same bytes.
  figure.savefig(
    out,
    format='png',
    dpi=170,
    facecolor='white',
    bbox_inches='tight',
    pad_inches=0.12,
    metadata={'Software': None},
  )
  return out.getvalue()


def acc_asr(
  methods: Mapping[str, Mapping[str, tuple[float, float, float]]],
  controls: Sequence[str],
  *,
  names: Mapping[str, str],
) -> bytes:
  """Draws mean accuracy against mean attack success; upper left is good.

  Args:
    methods: by name, `{'acc': (value, low, high), 'asr': ...}` in [0, 1];
      without any 'asr', accuracies alone are drawn.
    controls: names of those that are points of reference, not merges to use.
    names: what to write at a point, by name; others are written as they are.

  Returns:
    A PNG file.
  """
  with matplotlib.rc_context(STYLE):
    if not any('asr' in m for m in methods.values()):
      return _accuracies(methods, controls, names)
    figure = Figure(figsize=(7.4, 5.2))
    axes = figure.subplots()
    drawn = {n: m for n, m in methods.items() if {'acc', 'asr'} <= set(m)}
    for name, m in drawn.items():
      (y, y0, y1), (x, x0, x1) = (
        100 * np.asarray(m[key]) for key in ('acc', 'asr')
      )
      c, control = colour(name), name in controls
      axes.plot([x0, x1], [y, y], color=c, lw=1, alpha=0.35, zorder=2)
      axes.plot([x, x], [y0, y1], color=c, lw=1, alpha=0.35, zorder=2)
      axes.plot(
        *(x, y),
        marker='D' if control else 'o',
        ms=6 if control else 8 if name.startswith('dam_robust') else 6.5,
        mfc='white' if control else c,
        mec=INK if control else 'white',
        mew=1.2 if control else 0.8,
        zorder=4,
      )
    axes.set_xlim(-4, 104)
    low, high = axes.get_ylim()
    axes.set_ylim(low - 0.08 * (high - low), high + 0.1 * (high - low))
    rules = {
      'clean_merge': 'floor: these triggers on clean models',
      'single': 'ceiling: the backdoored models alone',
    }
    for line, (name, text) in enumerate(rules.items()):
      if name in drawn:
        _rule(axes, 100 * drawn[name]['asr'][0], text, line)
    axes.set_xlabel(
      'attack success rate, % (mean of the attacked tasks) — lower is safer'
    )
    axes.set_ylabel('clean accuracy, % (mean of all tasks)')
    points = {
      n: (100 * m['asr'][0], 100 * m['acc'][0]) for n, m in drawn.items()
    }
    _label(axes, points, controls, names)
    return png(figure)


def _rule(axes, x: float, text: str, line: int) -> None:
  axes.axvline(x, color=MUTED, lw=0.9, ls=(0, (4, 3)), zorder=1)
  right = x > 50
  axes.annotate(
    text,
    (x, 1),
    xycoords=('data', 'axes fraction'),
    xytext=(-4 if right else 4, -3 - 12 * line),
    textcoords='offset points',
    ha='right' if right else 'left',
    va='top',
    fontsize=7.5,
    color=MUTED,
  )


def _label(axes, points, controls, names) -> None:
  """Writes names beside points; where it is crowded, in the right margin."""
  canvas = FigureCanvasAgg(axes.figure)
  canvas.draw()
  renderer = canvas.get_renderer()
  unit = axes.figure.dpi / 72
  bounds = axes.get_window_extent(renderer).extents
  pixels = {n: axes.transData.transform(p) for n, p in points.items()}
  boxes = [(*(p - 5 * unit), *(p + 5 * unit)) for p in pixels.values()]
  boxes += [tuple(t.get_window_extent(renderer).extents) for t in axes.texts]
  inverse = axes.transData.inverted()
  outside = {}
  for name, point in sorted(pixels.items(), key=lambda item: -item[1][1]):
    text = axes.text(
      *(0, 0),
      names.get(name, name),
      va='center',
      fontsize=8,
      color=MUTED if name in controls else INK,
      fontweight='bold' if name == 'dam_robust' else 'normal',
      path_effects=[patheffects.withStroke(linewidth=2.5, foreground='white')],
      zorder=5,
    )
    size = np.array(text.get_window_extent(renderer).size)
    far = point[0] < 0.4 * bounds[0] + 0.6 * bounds[2]
    for box in _places(point, size, unit, (9, 13, 18, 24) if far else (9, 13)):
      if _within(box, bounds) and not any(_overlap(box, b) for b in boxes):
        boxes.append(box)
        text.set_position(inverse.transform((box[0], (box[1] + box[3]) / 2)))
        break
    else:
      outside[name] = text, size[1]
  height = 1.25 * max([h for _, h in outside.values()], default=0)
  wanted = [pixels[name][1] for name in outside]
  for (name, (text, _)), y in zip(
    outside.items(), _spread(wanted, height, bounds), strict=True
  ):
    ends = [pixels[name], (bounds[2], y), (bounds[2] + 8 * unit, y)]
    ends = inverse.transform(ends)
    axes.plot(*ends.T, color=colour(name), lw=0.7, alpha=0.6, clip_on=False)
    text.set_position(inverse.transform((bounds[2] + 11 * unit, y)))


def _places(point, size, unit, radii):
  """Yields boxes for a text of some size close to a point, the best first."""
  for radius in radii:
    for angle in np.deg2rad([0, 180, 90, 270, 30, 150, 330, 210]):
      way = np.array([np.cos(angle), np.sin(angle)])
      centre = point + way * (radius * unit + size * [0.5, 0.25])
      yield (*(centre - size / 2), *(centre + size / 2))


def _spread(wanted, height, bounds):
  """Moves falling positions apart, keeping their order and their middle."""
  y = np.array(wanted, dtype=float)
  for i in range(1, len(y)):
    y[i] = min(y[i], y[i - 1] - height)
  if len(y):
    y += np.mean(wanted - y)
    y += max(0, bounds[1] + height / 2 - y[-1])
    y -= max(0, y[0] - bounds[3] + height / 2)
  return y


def _within(a, b) -> bool:
  return a[0] > b[0] and a[1] > b[1] and a[2] < b[2] and a[3] < b[3]


def _overlap(a, b) -> bool:
  return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _accuracies(methods, controls, names) -> bytes:
  order = sorted(methods, key=lambda n: methods[n]['acc'][0])
  figure = Figure(figsize=(6.4, 0.9 + 0.26 * len(order)))
  axes = figure.subplots()
  for i, name in enumerate(order):
    x, low, high = 100 * np.asarray(methods[name]['acc'])
    c = colour(name)
    axes.plot([low, high], [i, i], color=c, lw=1.4, alpha=0.4)
    control = name in controls
    axes.plot(
      *(x, i),
      marker='D' if control else 'o',
      mfc='white' if control else c,
      mec=INK if control else c,
    )
    axes.annotate(
      f'{x:.1f}',
      (high, i),
      xytext=(5, 0),
      textcoords='offset points',
      va='center',
      fontsize=8,
      color=MUTED,
    )
  axes.set_yticks(range(len(order)), [names.get(n, n) for n in order])
  axes.set_xlabel('clean accuracy, % (mean of all tasks)')
  axes.margins(x=0.1)
  return png(figure)


_PANELS = (
  ('inner/loss', 'inner step: loss'),
  ('perturbation/loss', 'adversary: loss'),
  ('perturbation/fooled', 'adversary: share fooled'),
  ('clean/loss', 'masks: clean loss'),
  ('safety/loss', 'masks: safety loss'),
  ('coefficients/loss', 'coefficients: loss'),
  ('fisher/trace', 'Fisher information: trace'),
  ('grams/trace', 'inputs: mean squares, summed'),
)


def curves(metrics: Mapping[str, np.ndarray], tasks: Sequence[str]) -> bytes:
  """Draws what the steps of a merge measured, a panel a quantity.

  Args:
    metrics: by name, `[steps, T]`; NaN where a step did not measure it.
    tasks: names of the `T` tasks.

  Returns:
    A PNG file.
  """
  panels = [(k, title) for k, title in _PANELS if k in metrics]
  with matplotlib.rc_context(STYLE):
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(2.7 * columns + 0.2, 2.05 * rows + 0.4))
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (key, title) in zip(grid, panels, strict=False):
      values = np.asarray(metrics[key])
      for t, task in enumerate(tasks):
        kept = np.flatnonzero(np.isfinite(values[:, t]))
        x, y = _smooth(kept, values[kept, t])
        c = TASK_COLOURS[t % len(TASK_COLOURS)]
        axes.plot(x, y, color=c, lw=1.2, label=task)
      axes.set_title(title)
      axes.set_xlabel('step', fontsize=8, color=MUTED)
      if key == 'perturbation/fooled':
        axes.set_ylim(-0.03, 1.03)
    for axes in grid[len(panels) :]:
      axes.set_visible(False)
    figure.tight_layout(w_pad=1.2, h_pad=1.0, rect=(0, 0.1 / rows, 1, 1))
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(
      handles,
      labels,
      loc='lower center',
      ncols=len(labels),
      handlelength=1.2,
      columnspacing=1.2,
    )
    return png(figure)


def _smooth(x: np.ndarray, y: np.ndarray, points: int = 120):
  """Averages neighbouring steps until at most `points` are left."""
  width = max(1, len(x) // points)
  num = len(x) // width * width
  if not num:
    return x, y
  return tuple(a[:num].reshape(-1, width).mean(axis=1) for a in (x, y))


def found_triggers(
  tasks: Sequence[str],
  true: Mapping[str, np.ndarray],
  found: np.ndarray,
  *,
  names: Sequence[str],
  opacity: np.ndarray | None = None,
) -> bytes:
  """Draws what the defence's adversary found beside the true triggers.

  Args:
    tasks: names of the `T` tasks.
    true: by attacked task, a picture `[H, W, C]` in [0, 1] of its trigger.
    found: `[R, T, H, W, C]` in [0, 1], the adversary's pictures.
    names: what each of the `R` is called.
    opacity: `[R, T]` mean opacity of these, written below where given.

  Returns:
    A PNG file.
  """
  restarts, num_tasks = found.shape[:2]
  with matplotlib.rc_context({**STYLE, 'axes.grid': False}):
    figure = Figure(figsize=(1.32 * num_tasks + 0.9, 1.55 * (restarts + 1)))
    grid = figure.subplots(restarts + 1, num_tasks, squeeze=False)
    for t, task in enumerate(tasks):
      attacked = task in true
      grid[0, t].set_title(
        task,
        loc='center',
        color='#D55E00' if attacked else INK,
        fontweight='bold' if attacked else 'normal',
      )
      for r, axes in enumerate(grid[:, t]):
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_box_aspect(1)
        for spine in axes.spines.values():
          spine.set(visible=True, color=RULE)
        if r:
          axes.imshow(found[r - 1, t], vmin=0, vmax=1, interpolation='nearest')
          if opacity is not None:
            axes.set_xlabel(
              f'covers {100 * opacity[r - 1, t]:.0f} %', fontsize=7.5
            )
        elif attacked:
          axes.imshow(true[task], vmin=0, vmax=1, interpolation='nearest')
        else:
          axes.text(
            *(0.5, 0.5),
            'none\nknown',
            ha='center',
            va='center',
            transform=axes.transAxes,
            fontsize=8,
            color=MUTED,
          )
    for r, axes in enumerate(grid[:, 0]):
      axes.set_ylabel(('true trigger', *names)[r])
    figure.subplots_adjust(wspace=0.08, hspace=0.16)
    return png(figure)


def inversions(
  rows: Sequence[Mapping[str, Any]], patches: Mapping[str, np.ndarray]
) -> bytes:
  """Draws the trigger found on each upload, the most suspicious first.

  Args:
    rows: of an audit.
    patches: by upload, the patch on grey `[H, W, C]` in [0, 1].

  Returns:
    A PNG file.
  """
  columns = min(6, len(rows))
  lines = -(-len(rows) // columns)
  with matplotlib.rc_context({**STYLE, 'axes.grid': False}):
    figure = Figure(figsize=(1.75 * columns, 2.3 * lines))
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in grid:
      axes.set_axis_off()
    for axes, row in zip(grid, rows, strict=False):
      axes.set_axis_on()
      axes.set_xticks([])
      axes.set_yticks([])
      for spine in axes.spines.values():
        spine.set(visible=True, color=RULE)
      picture = patches[row['model']]
      axes.imshow(picture, vmin=0, vmax=1, interpolation='nearest')
      colour = '#D55E00' if row['known'] == 'bad' else INK
      axes.set_title(
        _wrapped(row['model']), fontsize=7, loc='center', color=colour
      )
      label = f'{row["suspicion"]:.2f}: {row["target_name"]}'
      axes.set_xlabel(_wrapped(label), fontsize=7)
    figure.subplots_adjust(wspace=0.12, hspace=0.5)
    return png(figure)


def lines(image_shape: tuple[int, int, int]) -> jax.Array:
  """Draws a grid `[H, W, C]` in [0, 1], on which warps can be seen."""
  height, width, _ = image_shape
  out = np.full(image_shape, 0.9, np.float32)
  out[height // 16 :: height // 8] = out[:, width // 16 :: width // 8] = 0.2
  return jnp.asarray(out)


def shown(
  trigger: attacks.Trigger, image_shape: tuple[int, int, int]
) -> np.ndarray:
  """Draws a trigger `[H, W, C]` in [0, 1] on grey, or a warp on lines."""
  grey = jnp.full(image_shape, 0.5)
  on = lines(image_shape) if trigger.kind == 'warp' else grey
  return np.asarray(attacks.apply_trigger(trigger, on))


def _wrapped(text: str) -> str:
  """Breaks a name into lines that fit a small picture, after underscores."""
  return textwrap.fill(text.replace('_', '_ '), 26).replace('_ ', '_')


def roc(rows: Sequence[Mapping[str, Any]]) -> bytes:
  """Draws which share of bad and of clean uploads each threshold flags.

  Args:
    rows: of an audit, of which some are known to be bad and some clean.

  Returns:
    A PNG file.
  """
  bad, clean = (
    np.array([r['suspicion'] for r in rows if r['known'] == known])
    for known in ('bad', 'clean')
  )
  thresholds = np.unique([*bad, *clean])[::-1]
  x = [0.0, *((clean >= t).mean() for t in thresholds)]
  y = [0.0, *((bad >= t).mean() for t in thresholds)]
  with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(3.6, 3.4))
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=RULE)
    axes.step(x, y, where='post', color='#0072B2', linewidth=2)
    axes.set_xlabel(f'share of {len(clean)} clean uploads flagged')
    axes.set_ylabel(f'share of {len(bad)} bad uploads flagged')
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_aspect('equal')
    return png(figure)
