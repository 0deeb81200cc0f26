"""`dam-jax` from files to files: what it writes, prints and refuses."""

import json

import jax
import numpy as np
import pytest

import dam_jax as dj
from dam_jax import checkpoint
from dam_jax import cli


def make(seed, rows=6):
  rng = np.random.default_rng(seed)

  def draw(*shape):
    return rng.normal(size=shape).astype(np.float32)

  return {
    'embed': {'weight': draw(rows, 4)},
    'layers': [{'weight': draw(4, 4), 'bias': draw(4)} for _ in range(2)],
    'step': np.array([seed, 1]),
  }


@pytest.fixture
def files(tmp_path):
  """Paths of a base and of two experts, and of a folder."""
  for name, seed in (('base', 0), ('a', 1), ('b', 2)):
    checkpoint.save_params(tmp_path / f'{name}.safetensors', make(seed))
  return tmp_path


def arguments(folder, *more, experts=('a', 'b'), method='average'):
  given = [f'--expert={n}={folder / n}.safetensors' for n in experts]
  base = f'--base={folder / "base"}.safetensors'
  return [base, *given, f'--method={method}', *more]


def merge(folder, *more, out='out', **options):
  argv = arguments(folder, f'--out={folder / out}', *more, **options)
  code = cli.main(['merge', *argv])
  return code, folder / out


def read(path):
  model = checkpoint.open_model(path)
  return {p: model.read(p) for p in model.leaves}


def want(tx, experts=(1, 2)):
  params = make(0)
  merged = dj.streaming.merge(tx, params, [make(k) for k in experts])
  return dj.tree.flatten(merged)


def assert_equal(got, wanted):
  assert set(got) == set(wanted)
  for path, leaf in wanted.items():
    np.testing.assert_array_equal(got[path], leaf, err_msg=path)


@pytest.mark.parametrize(
  ('method', 'settings', 'tx'),
  [
    ('average', (), dj.average()),
    ('ties', ('density=0.3', 'scale=0.5'), dj.ties(0.3, 0.5)),
    (
      'dare',
      ('rate=0.4', 'then=task_arithmetic', 'then.scale=0.5'),
      dj.dare(0.4, then=dj.task_arithmetic(0.5)),
    ),
    ('weighted_average', ('weights=[1, 3]',), dj.weighted_average([1, 3])),
  ],
)
def test_merge_writes_what_the_library_computes(files, method, settings, tx):
  flags = [f'--set={text}' for text in settings]
  code, out = merge(files, *flags, method=method)
  assert code == 0
  assert_equal(read(out), want(tx))


def test_rules_label_leaves_and_set_their_options(files):
  code, out = merge(
    files,
    '--rule=embed/.*=keep',
    '--rule=.*/bias=b',
    '--rule=layers/1/.*=slow',
    '--set=scale=0.3',
    '--set=slow.scale=0.1',
    method='task_arithmetic',
  )
  assert code == 0
  got, base, other = read(out), dj.tree.flatten(make(0)), make(2)
  fast, slow = want(dj.task_arithmetic(0.3)), want(dj.task_arithmetic(0.1))
  assert_equal(
    got,
    {
      **fast,
      'embed/weight': base['embed/weight'],
      'layers/1/weight': slow['layers/1/weight'],
      'layers/0/bias': other['layers'][0]['bias'],
      'layers/1/bias': other['layers'][1]['bias'],
    },
  )


def test_a_config_and_flags_make_the_same_job(files, capsys):
  options = {'method': 'task_arithmetic'}
  _, plain = merge(files, '--set=scale=0.3', '--rule=embed/.*=keep', **options)
  config = {
    'base': str(files / 'base.safetensors'),
    'experts': {n: str(files / f'{n}.safetensors') for n in 'ab'},
    'method': 'task_arithmetic',
    'options': {'scale': 0.9},
    'rules': [['embed/.*', 'keep']],
  }
  (files / 'job.json').write_text(json.dumps(config))
  argv = [f'--config={files / "job.json"}', '--set=scale=0.3']
  assert cli.main(['merge', *argv, f'--out={files / "other"}']) == 0
  assert_equal(read(files / 'other'), read(plain))
  config['speed'] = 3
  (files / 'job.json').write_text(json.dumps(config))
  assert cli.main(['check', *argv]) == 2
  assert 'want an object with keys of' in capsys.readouterr().err


def test_dtype_and_formats(files):
  code, half = merge(files, '--dtype=bfloat16', out='half.safetensors')
  assert code == 0
  assert read(half)['embed/weight'].dtype == jax.numpy.bfloat16
  code, orbax = merge(files, '--format=orbax', out='orbax')
  assert code == 0
  assert_equal(read(orbax), want(dj.average()))
  assert not [p for p in files.iterdir() if p.name.startswith('.')]


def test_vocabularies_of_other_sizes_need_a_rule(files, capsys):
  checkpoint.save_params(files / 'c.safetensors', make(3, rows=8))
  code, _ = merge(files, experts=('a', 'c'), method='average')
  assert code == 2
  assert 'c: embed/weight: got float32[8, 4]' in capsys.readouterr().err
  sizes = {}
  carry = files / 'carry'
  carry.mkdir()
  (carry / 'config.json').write_text(
    '{"vocab_size": 6, "text_config": {"vocab_size": 6}, "other": 6}'
  )
  for rule in ('keep', 'pad', 'intersect'):
    code, out = merge(
      files,
      f'--vocab=embed/.*={rule}',
      f'--carry={carry}',
      experts=('a', 'c'),
      method='average',
      out=rule,
    )
    assert code == 0
    sizes[rule] = read(out)['embed/weight'].shape[0]
    config = json.loads((out / 'config.json').read_text())
    assert config == {
      'vocab_size': sizes[rule],
      'text_config': {'vocab_size': sizes[rule]},
      'other': 6,
    }
  assert sizes == {'keep': 6, 'pad': 8, 'intersect': 6}
  kept = read(files / 'keep')['embed/weight']
  np.testing.assert_array_equal(kept, make(0)['embed']['weight'])


def test_tied_leaves_stay_tied(tmp_path, capsys):
  for seed, name in enumerate(('base', 'a', 'b')):
    params = make(seed)
    params['head'] = {'weight': params['embed']['weight']}
    checkpoint.save_params(tmp_path / f'{name}.safetensors', params)
  code, out = merge(tmp_path, method='dare')
  assert code == 0
  got = read(out)
  np.testing.assert_array_equal(got['head/weight'], got['embed/weight'])
  code, _ = merge(tmp_path, '--rule=head/.*=keep', out='other')
  assert code == 2
  assert 'tied leaves have different rules' in capsys.readouterr().err


def test_an_interrupted_merge_goes_on(files, monkeypatch, capsys):
  put, count, written = checkpoint.ModelWriter.put, 0, []

  def stop(self, path, array):
    nonlocal count
    count += 1
    if count == 4:
      raise KeyboardInterrupt
    put(self, path, array)
    written.append(path)

  monkeypatch.setattr(checkpoint.ModelWriter, 'put', stop)
  code, out = merge(files, '--workers=1')
  assert code == 130
  assert not out.exists()
  first = len(written)
  assert first >= 3
  code, out = merge(files, '--workers=1')
  assert code == 0
  assert sorted(written) == sorted(dj.tree.flatten(make(0)))
  assert_equal(read(out), want(dj.average()))
  assert f'goes on: an interrupted run wrote {first}' in capsys.readouterr().err


def test_a_full_disk_is_another_code(files, monkeypatch):
  def full(self, path, array):
    raise OSError('no space left')

  monkeypatch.setattr(checkpoint.ModelWriter, 'put', full)
  assert merge(files)[0] == 3


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--method=tie'], "no method 'tie', there are average"),
    (['--set=densty=0.2'], "no option 'densty'; its options are"),
    (['--method=ties', '--set=density=2'], 'density must be in (0, 1], got 2'),
    (['--set=density'], 'want KEY=VALUE'),
    (['--rule=nothing=keep'], "rule 'nothing' matches no leaf"),
    (['--rule=embed/.*=fast'], 'fast: neither'),
    (['--rule=[=keep'], 'rules: '),
    (
      ['--method=ties', '--set=weights=[1, 2, 3]'],
      'weights are [3], want one for each of 2',
    ),
    (['--expert=c=x'], 'x: no such file'),
    (['--expert=a=x'], 'names must differ'),
    (['--vocab=embed/.*=crop'], "must be one of ('keep', 'pad', 'intersect')"),
    (['--base='], 'missing: --base'),
  ],
)
def test_bad_input_is_refused_before_work(files, capsys, flags, message):
  assert cli.main(['check', *arguments(files, *flags)]) == 2
  assert message in capsys.readouterr().err.replace('\n', ' ')


def test_check_prints_the_plan(files, capsys):
  argv = arguments(files, '--rule=embed/.*=keep', method='ties')
  assert cli.main(['check', *argv]) == 0
  assert 'merge 4' in capsys.readouterr().out
  assert cli.main(['check', *argv, '--json']) == 0
  plan = json.loads(capsys.readouterr().out)
  leaves, embed, step = 2 * (16 + 4) * 4, 24 * 4, 16
  assert plan['labels'] == {'keep': 1, 'merge': 5}
  assert plan['passes'] == {'keep': 1, 'merge': 4}
  assert plan['write_bytes'] == leaves + embed + step
  assert plan['parameters'] == 2 * 20 + 24 + 2


def test_merge_prints_json(files, capsys):
  merge(files, '--json')
  found = json.loads(capsys.readouterr().out)
  assert found['record']['method'] == 'average'
  assert found['plan']['experts'] == 2
  assert found['seconds'] > 0


def test_existing_output_is_kept_unless_told(files, capsys):
  _, out = merge(files)
  before = read(out)
  assert merge(files, '--set=scale=1', method='task_arithmetic')[0] == 2
  assert 'exists' in capsys.readouterr().err
  assert_equal(read(out), before)
  code, _ = merge(files, '--overwrite', method='task_arithmetic')
  assert code == 0
  assert_equal(read(out), want(dj.task_arithmetic()))


def test_diff_says_whether_models_differ(files, capsys):
  a, b, base = (str(files / f'{n}.safetensors') for n in ('a', 'b', 'base'))
  assert cli.main(['diff', a, a]) == 0
  assert cli.main(['diff', a, b]) == 1
  capsys.readouterr()
  assert cli.main(['diff', a, b, f'--base={base}', '--json']) == 1
  found = json.loads(capsys.readouterr().out)
  flat = [dj.tree.flatten(make(k)) for k in (0, 1, 2)]
  x, y = (
    np.concatenate([(m[p] - flat[0][p]).ravel() for p in m if p != 'step'])
    for m in flat[1:]
  )
  whole = found['whole']
  assert whole['norm_task_vector_a'] == pytest.approx(np.linalg.norm(x), 1e-5)
  assert whole['cosine'] == pytest.approx(
    x @ y / np.linalg.norm(x) / np.linalg.norm(y), 1e-4
  )
  assert whole['sign_conflicts'] == pytest.approx(np.mean(x * y < 0))
  assert set(found['layers']) == {'embed', 'layers/0', 'layers/1', 'step'}


def test_diff_draws_a_picture(files):
  paths = [str(files / f'{n}.safetensors') for n in 'ab']
  picture = files / 'diff.png'
  assert cli.main(['diff', *paths, f'--picture={picture}']) == 1
  assert picture.read_bytes().startswith(b'\x89PNG')


def test_diff_refuses_models_of_other_shapes(files, capsys):
  checkpoint.save_params(files / 'c.safetensors', make(3, rows=8))
  paths = [str(files / f'{n}.safetensors') for n in 'ac']
  assert cli.main(['diff', *paths]) == 2
  assert 'embed/weight' in capsys.readouterr().err


def test_methods_are_listed_with_reference(capsys):
  assert cli.main(['methods']) == 0
  assert 'task_arithmetic' in capsys.readouterr().out
  assert cli.main(['methods', 'ties']) == 0
  assert 'elect signs' in capsys.readouterr().out
  assert cli.main(['methods', '--json']) == 0
  found = {m['name']: m for m in json.loads(capsys.readouterr().out)}
  assert found['ties']['url'] == 'https://arxiv.org/abs/2306.01708'
  assert found['weighted_average']['options']['weights'] == 'required'
  assert cli.main(['methods', 'tie']) == 2


def test_output_says_what_it_is_made_of(files):
  carry = files / 'carry'
  carry.mkdir()
  (carry / 'config.json').write_text('{"dtype": "float32", "x": 1}')
  _, out = merge(
    files,
    f'--carry={carry}',
    '--dtype=float16',
    '--rule=embed/.*=slow',
    '--set=slow.scale=0.1',
    method='task_arithmetic',
  )
  assert json.loads((out / 'config.json').read_text())['dtype'] == 'float16'
  text = (out / 'merge_record.json').read_text()
  record = checkpoint.MergeRecord.from_json(text)
  assert record.experts['a'] == checkpoint.file_hash(files / 'a.safetensors')
  assert record.hyperparameters == {'scale': 0.3}
  assert record.rules == [['embed/.*', '{"scale": 0.1}']]
  card = (out / 'README.md').read_text()
  for part in (
    record.experts['b'],
    '2212.04089',
    'No security report was made',
  ):
    assert part in card
  _, lone = merge(files, out='lone.safetensors')
  kept = json.loads(checkpoint.load_metadata(lone)['merge_record'])
  assert kept['method'] == 'average'
  assert 'average' in (files / 'lone.md').read_text()


def test_weights_are_read_as_torch_lays_them_out(files):
  code, out = merge(files, method='iso_cts')
  assert code == 0
  assert_equal(read(out), want(dj.iso_cts(input_axis=1)))
  text = (out / 'merge_record.json').read_text()
  record = checkpoint.MergeRecord.from_json(text)
  assert record.hyperparameters['input_axis'] == 1
  _, flax = merge(files, '--set=input_axis=0', method='iso_cts', out='flax')
  assert_equal(read(flax), want(dj.iso_cts(input_axis=0)))
