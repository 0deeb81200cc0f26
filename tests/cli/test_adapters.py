"""LoRA adapters as experts, expanded into a model or merged as they are."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

import dam_jax as dj
from dam_jax import checkpoint
from dam_jax import cli

SHAPES = {'q.weight': (8, 5), 'v.weight': (4, 6), 'bias': (3,)}
RANKS = {'a': 1, 'b': 2}


@pytest.fixture
def folder(tmp_path):
  """A base, and two adapters of other ranks; b has q alone."""
  rng = np.random.default_rng(0)

  def draw(*shape):
    return rng.normal(size=shape).astype(np.float32)

  save_file(
    {name: draw(*shape) for name, shape in SHAPES.items()},
    tmp_path / 'base.safetensors',
  )
  for name, rank in RANKS.items():
    adapter = tmp_path / name
    adapter.mkdir()
    tensors = {}
    for module in ('q', 'v') if name == 'a' else ('q',):
      out, width = SHAPES[f'{module}.weight']
      prefix = f'base_model.model.{module}.lora_'
      tensors[f'{prefix}A.weight'] = draw(rank, width)
      tensors[f'{prefix}B.weight'] = draw(out, rank)
    save_file(tensors, adapter / 'adapter_model.safetensors')
    config = {'peft_type': 'LORA', 'r': rank, 'lora_alpha': 2 * rank}
    config |= {'bias': 'none', 'target_modules': ['q', 'v']}
    (adapter / 'adapter_config.json').write_text(json.dumps(config))
  return tmp_path


def run(folder, *flags, out='out'):
  code = cli.main(
    [
      'merge',
      f'--base={folder / "base.safetensors"}',
      f'--expert={folder / "a"}',
      f'--expert={folder / "b"}',
      f'--out={folder / out}',
      *flags,
    ]
  )
  return code, folder / out


def weights(model):
  return {path: np.asarray(model.read(path)) for path in model.leaves}


def opened(folder):
  """Returns the base's weights, and those of each expert."""
  base = checkpoint.open_model(folder / 'base.safetensors')
  experts = [
    checkpoint.expand(base, checkpoint.open_lora(folder / name))
    for name in RANKS
  ]
  return base, weights(base), [weights(expert) for expert in experts]


def assert_close(got, want):
  assert set(got) == set(want)
  for path, leaf in want.items():
    np.testing.assert_allclose(got[path], leaf, rtol=1e-4, atol=1e-4)


def adapted(folder, out):
  base = checkpoint.open_model(folder / 'base.safetensors')
  return weights(checkpoint.expand(base, checkpoint.open_lora(out)))


def test_adapters_are_expanded_into_a_model(folder):
  code, out = run(folder, '--method=ties', '--set=density=0.5')
  assert code == 0
  _, base, experts = opened(folder)
  want = dj.streaming.merge(dj.ties(0.5), base, experts)
  assert_close(weights(checkpoint.open_model(out)), want)


@pytest.mark.parametrize(
  ('flags', 'tx'),
  [
    (['--method=task_arithmetic', '--set=scale=0.5'], dj.task_arithmetic(0.5)),
    (['--method=average'], dj.average()),
    (
      ['--method=weighted_average', '--set=weights=[3, 1]'],
      dj.weighted_average([3, 1]),
    ),
    (
      ['--method=knots', '--set=then=task_arithmetic', '--set=then.scale=0.5'],
      dj.task_arithmetic(0.5),
    ),
    (['--method=knots'], dj.knots(input_axis=1, rank=3)),
  ],
)
def test_an_adapter_is_the_same_update_kept_low_rank(folder, flags, tx):
  code, out = run(folder, '--adapter', *flags)
  assert code == 0
  text = (out / 'merge_record.json').read_text()
  record = checkpoint.MergeRecord.from_json(text)
  file = folder / 'b' / 'adapter_model.safetensors'
  assert checkpoint.file_hash(file) in record.files['b'].values()
  assert 'library_name: "peft"' in (out / 'README.md').read_text()
  _, base, experts = opened(folder)
  want = dj.merge(tx, base, dj.tree.stack(experts)).params
  assert_close(adapted(folder, out), want)


def test_ranks_add_up_unless_told(folder):
  _, out = run(folder, '--adapter', '--method=average')
  ranks = {p: f.rank for p, f in checkpoint.open_lora(out).factors.items()}
  assert ranks == {'q/weight': 3, 'v/weight': 1}
  _, small = run(folder, '--adapter', '--rank=2', '--method=average', out='two')
  _, base, _ = opened(folder)
  update = adapted(folder, out)['q/weight'] - base['q/weight']
  u, s, vt = np.linalg.svd(update)
  best = (u[:, :2] * s[:2]) @ vt[:2]
  got = adapted(folder, small)['q/weight'] - base['q/weight']
  np.testing.assert_allclose(got, best, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--method=ties', '--adapter'], "method: got 'ties', want one of"),
    (['--method=average', '--adapter', '--rule=bias=keep'], 'rules and'),
    (['--method=average', '--adapter', '--dtype=float16'], 'in float32'),
    (['--method=average', '--adapter', '--overwrite'], 'a new folder'),
    (['--method=average', '--rank=2'], 'pass --adapter'),
    (['--method=knots', '--adapter', '--set=rank=2'], 'takes then and scaled'),
    (['--method=average', '--adapter', '--expert=base.safetensors'], 'base'),
  ],
)
def test_what_adapters_cannot_do_is_refused(folder, capsys, flags, message):
  code, out = run(folder, *flags)
  assert code == 2
  assert message in capsys.readouterr().err
  assert not out.exists()
