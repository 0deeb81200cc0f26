"""The main job on a tiny pool: what it writes, resumes and refuses."""

import dataclasses
import io
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file

from configs import pool as pool_config
from configs import quickstart as quickstart_config
import dam_jax as dj
from dam_jax import checkpoint
from dam_jax.models import convert
from experiments import learn
from experiments import load
from experiments import merge
from experiments import merge_run
from experiments import methods
from experiments import report as report_lib


def _config(folder, **changes):
  config = pool_config.get_config()
  config.update(
    {
      'pool': str(folder),
      'bad': 'evil',
      'methods': 'average,dam_robust',
      'steps': 4,
      'batch': 4,
      'test_batch': 12,
      'transfer_test': 6,
      'scan_layers': False,
      'compiler_options': {},
      'audit': False,
    }
  )
  config.options.dam_robust.warmup_ascents = 4
  for key, value in changes.items():
    config[key] = value
  return config


def _run(config, workdir):
  return merge.run(config, workdir, Console(file=io.StringIO(), width=120))


@pytest.fixture(scope='module')
def done(small_pool, tmp_path_factory):
  """A finished run: its workdir and report."""
  workdir = tmp_path_factory.mktemp('run')
  return workdir, _run(_config(small_pool), workdir)


def test_report_has_a_row_for_everything(done):
  workdir, report = done
  assert json.loads((workdir / 'report.json').read_text()) == report
  rows = {(r['method'], r['metric'], r['task']): r for r in report['rows']}
  assert len(rows) == len(report['rows'])
  for method in ('average', 'task_arithmetic', 'dam_robust'):
    assert {k[1:] for k in rows if k[0] == method} == {
      *(('acc', t) for t in ('one', 'two', 'three', 'mean', 'worst')),
      *((m, t) for m in ('asr', 'ra', 'der') for t in ('two', 'mean', 'worst')),
      *(('transfer', t) for t in ('one', 'three', 'mean', 'worst')),
    }
  assert {k[0] for k in rows} - set(methods.ALL) == {
    'base',
    'single',
    'clean_merge',
    'oracle',
  }
  for row in report['rows']:
    assert set(row) == {
      *('method', 'task', 'role', 'metric', 'value', 'low', 'high', 'n')
    }
    assert 0 <= row['low'] <= row['value'] <= row['high'] <= 1
  assert rows['dam_robust', 'acc', 'one']['n'] == 12
  assert rows['dam_robust', 'asr', 'two']['n'] == 9  # not of the target class
  assert rows['dam_robust', 'asr', 'two']['role'] == 'attacked'
  assert rows['dam_robust', 'acc', 'one']['role'] == 'clean'
  assert rows['dam_robust', 'acc', 'mean']['role'] == 'all'
  assert rows['task_arithmetic', 'der', 'two']['value'] == 0.5


def test_record_says_what_was_merged_and_how(done, small_pool):
  record = done[1]['record']
  path = small_pool / 'checkpoints' / 'evil.safetensors'
  assert record['hashes']['evil'] == checkpoint.file_hash(path)
  assert record['experts']['two'] == 'evil'
  assert record['attacked'][0]['target_name'] == 'two 1'
  assert record['seconds']['dam_robust']['steps'] == 4
  assert record['options']['dam_robust']['safety_weight'] == 0.3
  assert record['transfer']['average']['evil']['targets'].keys() == {
    'one',
    'three',
  }


def test_files_a_person_opens(done):
  workdir, _ = done
  for name in (
    'acc_asr.png',
    'report.md',
    'report.html',
    'curves/dam_robust.png',
    'triggers/dam_robust.png',
  ):
    assert (workdir / name).stat().st_size > 500, name
  table = (workdir / 'curves' / 'dam_robust.csv').read_text().splitlines()
  assert len(table) == 1 + 4
  assert 'safety/loss/two' in table[0]
  shares = json.loads((workdir / 'masks' / 'dam_robust.json').read_text())
  parts = [leaf.split('/')[0] for leaf in shares['task']]
  assert parts.index('pre_layernorm') < parts.index('layers_0')
  assert parts.index('layers_0') < parts.index('post_layernorm')
  assert not list(workdir.rglob('*.tmp'))


def test_cards_say_what_was_measured(done):
  workdir, report = done
  card = (workdir / 'models' / 'dam_robust' / 'README.md').read_text()
  row = report_lib.index(report)['dam_robust', 'acc', 'mean']
  assert f'| ACC mean | {100 * row["value"]:.1f} % (' in card
  assert '| ASR two |' in card
  assert 'No security report' not in card


def test_merged_model_can_be_merged_again(done, small_pool):
  folder = done[0] / 'models' / 'average'
  params = checkpoint.load_params(
    folder / 'model.safetensors', name_map=convert.clip_vision
  )
  names = ('clean_one', 'clean_three', 'evil')
  _, experts = checkpoint.load_experts(
    small_pool / 'checkpoints' / 'base.safetensors',
    {n: small_pool / 'checkpoints' / f'{n}.safetensors' for n in names},
    name_map=convert.clip_vision,
  )
  np.testing.assert_allclose(
    params['visual_projection']['kernel'],
    np.mean(experts['visual_projection']['kernel'], axis=0),
    atol=1e-6,
  )
  record = checkpoint.MergeRecord.from_json(
    checkpoint.load_metadata(folder / 'model.safetensors')['merge_record']
  )
  assert record.method == 'average'
  assert tuple(record.experts) == names
  assert dataclasses.asdict(record) == json.loads(
    (folder / 'merge_record.json').read_text()
  )
  assert (folder / 'config.json').exists()


def test_a_run_that_lost_a_result_makes_that_one_again(done, small_pool):
  workdir, report = done
  kept = workdir / 'results' / 'dam_robust.json'
  before = kept.stat().st_mtime_ns
  (workdir / 'results' / 'average.json').unlink()
  again = _run(_config(small_pool), workdir)
  assert again['rows'] == report['rows']
  assert (workdir / 'results' / 'average.json').exists()
  assert kept.stat().st_mtime_ns == before


def test_a_finished_run_says_so_and_does_nothing(done, small_pool):
  workdir, _ = done
  before = {p: p.stat().st_mtime_ns for p in workdir.rglob('*')}
  console = Console(file=io.StringIO(), width=120)
  again = merge.run(_config(small_pool), workdir, console)
  assert 'finished before, nothing to do' in console.file.getvalue()
  assert again == json.loads((workdir / 'report.json').read_text())
  assert {p: p.stat().st_mtime_ns for p in workdir.rglob('*')} == before


def test_another_run_may_not_use_the_workdir(done, small_pool):
  with pytest.raises(ValueError, match='holds a run with another config'):
    _run(_config(small_pool, steps=5), done[0])


@pytest.mark.parametrize('name', ['dam_robust', 'regmean_plus_plus'])
def test_an_interrupted_merge_ends_where_an_unbroken_one_does(
  small_pool, tmp_path, name
):
  config = _config(small_pool, steps=6, methods=name)
  setup = load.load(config, small_pool)
  this = merge_run.Run(config, setup, tmp_path / 'whole')
  merger = this.mergers[name]
  program = learn.compile_steps(
    merger,
    *this.raveled,
    this.data,
    batch=4,
    compiler_options={},
    max_chunk=3,
  )

  def run(folder, **options):
    return learn.learn(
      name,
      merger,
      program,
      *this.raveled,
      this.data,
      sizes=[8] * 3,
      tasks=setup.tasks,
      batch=4,
      seed=0,
      folder=folder,
      max_lost=1,
      **options,
    )

  whole = run(tmp_path / 'whole')
  taken = []

  def interrupt(steps):
    taken.append(steps)
    if sum(taken) >= 4:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    run(tmp_path / 'broken', advance=interrupt)
  rest = []
  again = run(tmp_path / 'broken', advance=rest.append)
  assert rest[0] > 0
  assert sum(rest) == merger.plan.steps
  for key, values in whole.metrics.items():
    np.testing.assert_array_equal(again.metrics[key], values)
  np.testing.assert_array_equal(
    again.params['visual_projection']['kernel'],
    whole.params['visual_projection']['kernel'],
  )
  table = f'curves/{name}.csv'
  assert (tmp_path / 'broken' / table).read_text() == (
    tmp_path / 'whole' / table
  ).read_text()


def test_a_merge_over_a_mesh_ends_where_one_device_does(
  small_pool, tmp_path, done
):
  names = 'dam_robust,repo_awm'
  config = _config(small_pool, methods=names, mesh='data=4,model=2')
  _run(config, tmp_path)
  path = 'models/dam_robust/model.safetensors'
  found, want = (load_file(folder / path) for folder in (tmp_path, done[0]))
  for name, x in want.items():
    # Biases of keys have no gradient, and Adam makes steps of its rounding.
    if 'k_proj.bias' not in name:
      np.testing.assert_allclose(found[name], x, atol=2e-4, err_msg=name)
  assert (tmp_path / 'models' / 'repo_awm' / 'model.safetensors').exists()
  config.mesh = ''  # a finished run may be looked at from any machine
  _run(config, tmp_path)
  config.mesh = 'data=8'
  with pytest.raises(ValueError, match='4 images a task do not divide over 8'):
    _run(config, tmp_path)
  config.mesh = 'eight'
  with pytest.raises(ValueError, match="mesh must be like 'data=4,model=2'"):
    _run(config, tmp_path)


def test_merges_by_statistics_report_as_others_do(small_pool, tmp_path):
  config = _config(small_pool, methods='fisher,regmean', steps=2)
  report = _run(config, tmp_path)
  assert report['record']['options']['fisher']['steps'] == 2
  assert report['record']['options']['regmean']['scale'] == 0.9
  rows = {(r['method'], r['metric'], r['task']) for r in report['rows']}
  for name in ('fisher', 'regmean'):
    assert (name, 'asr', 'two') in rows
    assert (tmp_path / 'curves' / f'{name}.png').stat().st_size > 500
    assert (tmp_path / 'models' / name / 'model.safetensors').exists()


def test_steps_bound_a_pass_and_do_not_lengthen_it():
  for steps, want in ((0, 16), (4, 4), (300, 16)):
    chosen = methods.resolve(['regmean'], {}, steps=steps, batch=8)
    assert chosen['regmean']['steps'] == want
    assert chosen['regmean']['batch'] == 8
  given = {'regmean': {'steps': 40}}
  chosen = methods.resolve(['regmean'], given, steps=300, batch=8)
  assert chosen['regmean']['steps'] == 40
  assert methods.parse('informed', 3) == list(methods.INFORMED)


def test_steps_include_those_in_which_patches_move_alone():
  for steps, want in ((0, (275, 100)), (300, (275, 100)), (8, (6, 8))):
    chosen = methods.resolve(['dam_robust'], {}, steps=steps, batch=8)
    got = chosen['dam_robust']
    assert (got['steps'], got['warmup_ascents']) == want


def test_true_labels_are_refused_where_there_are_none(small_pool, tmp_path):
  config = _config(small_pool, methods='fisher')
  config.options.fisher.labels = 'true'
  with pytest.raises(ValueError, match=r'options\.fisher\.labels: merges read'):
    _run(config, tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(small_pool, tmp_path):
  config = _config(small_pool, methods='adamerging_task_wise')
  config.options.adamerging_task_wise.init = 1e30
  match = 'step 0, phase coefficients, task one or three or two; saves are'
  with pytest.raises(FloatingPointError, match=match):
    _run(config, tmp_path)
  assert not list((tmp_path / 'states' / 'adamerging_task_wise').iterdir())
  assert not (tmp_path / 'results' / 'adamerging_task_wise.json').exists()


def test_without_bad_experts_triggers_can_still_be_tested(small_pool, tmp_path):
  config = _config(small_pool, bad='0', triggers='evil', methods='average')
  report = _run(config, tmp_path)
  rows = {(r['method'], r['metric'], r['task']): r for r in report['rows']}
  assert rows['average', 'asr', 'two']['role'] == 'clean'
  assert not {k for k in rows if k[1] == 'der' or k[0] == 'oracle'}
  assert report['record']['attacked'] == []
  assert report['record']['experts']['two'] == 'clean_two'


def test_bfloat16_computes_and_float32_is_kept(small_pool, tmp_path):
  names = ('dam_robust', 'regmean')
  config = _config(
    small_pool, bad='0', compute='bfloat16', methods=','.join(names)
  )
  # Flax's layer norms need it, and the thread that compiles must see it.
  jax.config.update('jax_numpy_dtype_promotion', 'standard')
  try:
    _run(config, tmp_path)
  finally:
    jax.config.update('jax_numpy_dtype_promotion', 'strict')
  for name in names:
    params = checkpoint.load_abstract(
      tmp_path / 'models' / name / 'model.safetensors'
    )
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype('float32')}


@pytest.mark.parametrize(
  ('changes', 'match'),
  [
    ({'methods': 'average,magic'}, "unknown methods .*magic.*allowed are"),
    ({'methods': ''}, 'no methods'),
    ({'methods': 'slerp'}, 'slerp merges 2 experts, got 3'),
    ({'methods': 'static,nuslerp'}, 'nuslerp merges 2 experts, got 3'),
    ({'bad': '7'}, 'usual_bad has 4'),
    ({'bad': 'nobody'}, r'nobody\.npz'),
    ({'tasks': 'one,one'}, 'task one comes twice'),
    ({'compute': 'float8'}, "'float32' or 'bfloat16', got 'float8'"),
    ({'test': -1}, 'test must not be negative, got -1'),
    ({'batch': 0}, 'batch must be positive, got 0'),
    ({'dev': 9}, 'asked for 9 dev images, there are 8'),
    ({'batch': 9, 'methods': 'dam_paper'}, 'task 0 has 8'),
    ({'pool': '/nowhere'}, 'no such folder'),
  ],
)  # fmt: skip
def test_bad_configs_are_refused_before_any_work(
  small_pool, tmp_path, changes, match
):
  config = _config(small_pool)
  config.update(changes)
  with pytest.raises(ValueError, match=match):
    _run(config, tmp_path)
  assert not (tmp_path / 'results').exists()


def test_a_config_with_other_keys_is_refused(small_pool, tmp_path):
  config = _config(small_pool)
  config.stepz = 3
  del config.seed
  with pytest.raises(ValueError, match='stepz: no such key') as e:
    _run(config, tmp_path)
  assert 'seed is missing' in str(e.value)
  config = _config(small_pool)
  config.make = {'patchh': 3}
  with pytest.raises(ValueError, match=r'make\.patchh: no such key.*seed'):
    _run(config, tmp_path)


def test_options_of_methods_are_checked(small_pool, tmp_path):
  config = _config(small_pool)
  config.options.ties.densty = 0.5
  with pytest.raises(
    ValueError, match=r'options\.ties\.densty: no such option'
  ):
    _run(config, tmp_path)
  config = _config(small_pool, methods='ties')
  config.options.ties.density = 1.5
  with pytest.raises(ValueError, match=r'density must be in \(0, 1\], got 1.5'):
    _run(config, tmp_path)
  given = {
    'dam_released': {'quirks': {'leek_outer': False}, 'mask': 3},
    'dam_pape': {},
  }
  with pytest.raises(ValueError, match='methods:') as e:
    methods.resolve(['dam_released'], given, steps=6, batch=4)
  for line in (
    r'options\.dam_released\.quirks\.leek_outer: .* allowed are stale_inner',
    r'options\.dam_released\.mask: got 3, want {.*temperature',
    r'options\.dam_pape: no such method',
  ):
    assert re.search(line, str(e.value))


@pytest.mark.parametrize(
  'options',
  [{}, {'xla_no_such_option': 1}, pool_config.get_config().compiler_options],
)
def test_options_that_xla_lacks_are_left_out(options):
  lowered = jax.jit(lambda x: x + 1).lower(1.0)
  assert lowered.compile(learn.usable(options))(1.0) == 2
  assert learn.usable(options) == (
    {} if 'xla_no_such_option' in options else dict(options)
  )


def test_quirks_and_masks_can_be_set_one_by_one():
  def start(**given):
    chosen = methods.resolve(
      ['dam_released'], {'dam_released': given}, steps=6, batch=4
    )['dam_released']
    merger = methods.build(
      'dam_released',
      chosen,
      logits_fn=lambda params, images: images,
      task_logits_fn=lambda params, task, images: images,
      preprocess_fn=lambda x: x,
      image_shape=(8, 8, 3),
      inputs_fn=lambda params, task, images: {},
      levels=['.*'],
    )
    base = {'w': jnp.zeros(3)}
    return merger.init(jax.random.key(0), base, dj.tree.stack([base] * 2))

  assert jax.tree.leaves(start().inner_state)
  assert start().masks['shared'].tolist() == [0, 0, 0]
  state = start(quirks={'persistent_adam': False}, mask={'init': 2.0})
  assert not jax.tree.leaves(state.inner_state)
  assert state.masks['shared'].tolist() == [2, 2, 2]


def test_a_truncated_checkpoint_is_named(small_pool, tmp_path):
  folder = tmp_path / 'pool'
  for path in small_pool.rglob('*'):
    if path.is_file():
      target = folder / path.relative_to(small_pool)
      target.parent.mkdir(parents=True, exist_ok=True)
      target.write_bytes(path.read_bytes())
  broken = folder / 'checkpoints' / 'clean_one.safetensors'
  broken.write_bytes(broken.read_bytes()[:-8])
  with pytest.raises(ValueError, match=r'clean_one\.safetensors'):
    _run(_config(folder), tmp_path / 'run')


def test_can_report_on_dev_without_a_look_at_test(small_pool):
  setups = [
    load.load(_config(small_pool, report_on=on, test=8), small_pool)
    for on in ('test', 'dev')
  ]
  for test, dev in zip(*(s.pool.tasks for s in setups), strict=True):
    assert (test.dev.images == dev.dev.images).all()
    assert (dev.test.images == dev.dev.images[:8]).all()
    assert (dev.test.labels == dev.dev.labels[:8]).all()
    assert (test.test.images != dev.test.images).any()
  with pytest.raises(ValueError, match="'test' or 'dev', got 'train'"):
    load.check_config(_config(small_pool, report_on='train'))


@pytest.mark.parametrize('module', [pool_config, quickstart_config])
def test_configs_know_every_key(module):
  for arg in ('', 'runlocal'):
    load.check_config(module.get_config(arg))
  with pytest.raises(ValueError, match='runlocal'):
    module.get_config('fast')


@pytest.mark.parametrize(
  'name', [name for name in methods.ALL if name not in methods.REPAIRS]
)
def test_every_method_can_be_built_from_its_options(name):
  chosen = methods.resolve(
    [name], {name: methods.config_options(name)}, steps=6, batch=4
  )[name]
  merger = methods.build(
    name,
    chosen,
    logits_fn=lambda params, images: images,
    task_logits_fn=lambda params, task, images: images,
    preprocess_fn=lambda x: x,
    image_shape=(8, 8, 3),
    inputs_fn=lambda params, task, images: {},
    levels=['low/.*', 'high/.*'],
  )
  if name in methods.LEARNED:
    assert merger.plan.steps == 6
  if name in methods.INFORMED:
    passes = 2 if name == 'regmean_plus_plus' else 1
    assert merger.plan.steps == 6 * passes
