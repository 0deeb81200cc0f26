"""Runs mergekit's methods, by their registered names, on given files."""

from mergekit.merge_methods.api import merge_state_dicts

from benchmarks import peer_files


def merge(job: peer_files.Job) -> peer_files.State:
  """Merges as `mergekit-pytorch` would."""
  models = {f'expert_{k}': x for k, x in enumerate(job.experts)}
  base = {'base': 'base', 'first': 'expert_0', 'experts': None}[job.inputs]
  if base == 'base':
    models = {'base': job.base, **models}
  return merge_state_dicts(
    models, job.method, parameters=job.options, base=base
  )


def merge_drawn(job: peer_files.Job) -> peer_files.State:
  """The same with given draws."""
  # mergekit goes leaf by leaf, and draws for one model after the other.
  uniform = job.each('uniform')
  draws = [x[name] for name in job.base for x in uniform]
  with peer_files.given_draws(draws):
    return merge(job)


if __name__ == '__main__':
  peer_files.run(merge_drawn, ('mergekit',))
