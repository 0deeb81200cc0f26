"""The study: which merges are safe, by how much, and at what price.

  python -m experiments.make_pool --config=configs/nano_pool.py \
    --config.tasks_folder=../shared/pool/tasks --workdir=../nano_pool
  python -m experiments.study --config=configs/study.py \
    --config.nano_pool=../nano_pool --workdir=PATH

An interrupted study goes on where it was when it is started again with the same
workdir; so does one with more sections, attacks or seeds. To see one section:
`--config.sections=defences`. All of them take a night on two cores, and were
run in small only, as the end says.

Of the section succession on a nano pool, with 150 steps in all and 300 test
images, three uploads on each of svhn and gtsrb, three merges each, with 95 %
intervals over uploads, merges and images:

             |                 | ACC                 | ASR
  badnets    | task_arithmetic | 60.4 (58.0 to 62.7) | 20.9 (14.0 to 27.9)
             | average         | 62.9 (60.4 to 65.1) | 11.6 (7.0 to 16.8)
             | ties            | 55.8 (53.4 to 58.1) | 20.3 (13.6 to 27.0)
             | dam_robust      | 63.1 (60.7 to 65.4) | 3.3 (1.5 to 5.3)
             | clean merge     | 61.1 (58.7 to 63.4) | 3.4 (1.5 to 5.3)
  badmerging | task_arithmetic | 59.7 (57.3 to 62.0) | 87.2 (81.8 to 91.8)
             | average         | 62.1 (59.7 to 64.4) | 78.9 (73.0 to 84.5)
             | ties            | 53.5 (51.1 to 55.8) | 87.5 (80.0 to 93.9)
             | dam_robust      | 62.8 (60.3 to 65.0) | 9.7 (5.2 to 15.6)
             | clean merge     | 61.1 (58.7 to 63.4) | 17.9 (10.5 to 26.7)

The ASR of `dam_robust` over that of the clean merge, paired: -0.1 (-2.9 to 3.1)
and -8.2 (-14.5 to -1.5); its ACC over that of task_arithmetic, 2.6 (1.0 to 4.3)
and 3.0 (1.4 to 4.6). Of 36 merges 32 are at most 3 points over the clean merge.
Two of the rest are of BadNets' first on svhn, 12.7 and 10.4 where the clean
merge has 2.2 and task_arithmetic 14.2: the audit names no class (suspicions of
0.2 and 0.3). Two are of BadMerging's second on svhn, 16.0 and 23.5 (10.8),
whose target it names with 2.2 and 3.1. Over uploads and keys the audit's area
under the ROC curve is 0.95 for BadMerging, of which it names a class 17 times
of 18, and 0.73 for BadNets, 13 of 18; and 4 of 15 times a class of a clean one.
A merge with its audit took 90 to 150 s on a core that others use too.

Before, on a pool made alike, with a longer audit and a constant rate: ASR 3.1
(1.2 to 5.6), where the clean merge has 2.7, and 10.1 (4.4 to 19.7; 14.3), ACC
63.4 and 63.2. There too 32 of 36 were at most 3 points over the clean merge,
and one of BadMerging on gtsrb kept 57.9.

Before, mean ASR of three uploads on each, three seeds of each merge that draws,
with an older audit, of two rounds and of own experts alone:

             | task_arithmetic | average | ties | concrete | dam_robust | clean
  badmerging | 86.0            | 76.0    | 87.4 | 85.0     | 5.8        | 11.9
  lobam      | 67.0            | 57.5    | 92.8 |          | 8.0        | 10.2
  badnets    | 19.4            | 11.3    | 17.9 | 20.8     | 2.8        | 2.3
  blended    | 16.6            | 11.1    | 16.8 |          | 3.3        | 6.1
  wanet      | 11.2            | 7.5     | 17.5 |          | 16.7       | 4.1

where clean is task arithmetic of clean experts. `dam_robust` has an ACC of 61.5
to 62.9, task_arithmetic of 59.8 to 61.0, average of 62.6 to 63.5. Intervals
of its ASR over that of the clean merge: badnets -1.2 to 1.9, lobam -6.1 to 1.1,
blended -4.6 to -1.0, wanet 8.3 to 18.3. So it undid patches and blends, and
made WaNet worse, of which a plain merge keeps little; warps are searched since.
Concrete's badnets are 14 of the 18 runs. The worst single ones: badmerging 21.3
where the clean merge has 10.8, lobam 30.2 where it has 20.9, badnets 9.0 where
it has 9.0.

Of more attacks, with 150 steps of the masks and 25 before, one merge each: ACC
and ASR, in brackets the ASR of the clean merge and of task_arithmetic, which
has an ACC of 57 to 63:

             | on svhn                  | on gtsrb
  badmerging | 63.1, 4.0 (19.8, 92.1)   | 62.6, 2.1 (16.9, 94.1)
  badnets    | 63.3, 8.2 (2.6, 25.0)    | 64.0, 0.0 (0.0, 20.9)
  blended    | 62.8, 1.9 (8.2, 18.7)    | 63.2, 0.0 (0.0, 0.7)
  wanet      | 64.5, 5.8 (11.3, 21.5)   | 62.9, 6.5 (0.0, 0.7)
  lobam      | 62.6, 0.0 (9.9, 58.5)    | 63.0, 0.0 (2.4, 67.9)
  merge_backdoor
             | 65.6, 17.3 (15.2, 61.0)  | 65.8, 0.3 (0.0, 70.8)
    another  | 65.3, 5.4 (7.6, 75.9)    |
  badmerging_off_task
             | 62.7, 16.7 (14.9, 92.6)  |

So it is within 3 points of the clean merge for all but two: BadNets on svhn,
which has 1.1 in the table above, and WaNet on gtsrb, which does not survive a
plain merge. With this key the audit names a class of two clean uploads of four
too (suspicions of 0.7 and 1.0), which are then shunned for nothing.

`dam_robust` is no better than its seeds: with an older audit that named another
class badmerging_gtsrb_0 kept 87.2, and 46.9 where half of the seeds were of the
right class and half of another.

One upload on svhn and one on gtsrb of the rest, ASR, in brackets that of the
clean merge and of task_arithmetic, with an older audit:

  adaptive     | 14.0 (25.5, 95.0) | 3.8 (5.8, 55.7)
  lora         | 14.6 (23.1, 73.1) | 3.8 (10.3, 78.4)
  sparse       | 3.3 (13.5, 99.6)  | 0.0 (3.0, 99.0)
  sig          | 4.3 (2.2, 24.7)   | 4.3 (5.0, 19.8)
  badvit       | 29.5 (58.6, 92.9) | 41.8 (65.5, 95.1)
  trojvit      | 41.0 (64.6, 83.2) | 80.7 (74.3, 86.5)

Of the section adaptive, the same upload `adaptive`: dam_released 93.9 and 51.9,
average 88.5 and 51.5.

Of the section defences, badmerging_svhn_0 and 500 dev images a task, with
labels for those that read them; seconds on one core:

                  | ACC  | ASR  | labels | seconds
  task_arithmetic | 61.5 | 87.1 |        |
  anp             | 59.9 | 89.2 | yes    | 184
  awm             | 61.9 | 5.8  | yes    | 878
  fine_pruning    | 53.1 | 75.9 | yes    | 83
  clp             | 61.5 | 86.7 |        | 1
  sau             | 57.2 | 12.9 | yes    | 2396
  i_bau           | 57.7 | 55.0 | yes    | 124
  ibvs            | 61.1 | 86.3 | yes    | 31
  tbar            | 61.5 | 87.1 | yes    | 148
  lfpm            | 40.1 | 0.7  | yes    | 101
  wag             | 63.5 | 82.0 |        | 0
  repo_awm        | 61.2 | 85.3 |        | 43
  repo_sau        | 61.2 | 85.3 |        | 56
  dam_robust      | 62.9 | 4.7  |        | 33

The genuine AWM, which reads labels and takes 27 times as long, is as safe.

All sections in small, at a constant rate, with 150 steps and 300 test
images, one upload and one merge each: ACC and ASR with 95 % intervals over
images. On svhn and gtsrb, succession, where the clean merge has 1.3 and 18.3:

  badnets    | task_arithmetic | 61.8 (59.5 to 64.1) | 23.0 (19.4 to 26.7)
             | average         | 63.2 (60.8 to 65.5) | 11.7 (9.1 to 14.8)
             | ties            | 57.3 (54.8 to 59.6) | 22.9 (19.2 to 26.6)
             | dam_robust      | 63.8 (61.3 to 66.0) | 0.4 (0.0 to 1.5)
  badmerging | task_arithmetic | 60.9 (58.5 to 63.2) | 93.1 (90.6 to 95.1)
             | average         | 62.8 (60.4 to 65.1) | 88.3 (85.3 to 91.0)
             | ties            | 54.2 (51.9 to 56.7) | 93.4 (91.0 to 95.3)
             | dam_robust      | 62.8 (60.4 to 65.1) | 4.1 (2.5 to 6.2)

On tasks whose expert is clean the triggers give 18.6 (14.6 to 24.1) with
BadMerging and `dam_robust`, 39.8 (34.8 to 45.1) with task_arithmetic, 17.4 with
clean experts. The number of BadMerging experts among five tasks:

  bad | task_arithmetic | average     | ties        | dam_robust  | clean merge
  0   | 62.1            | 62.9        | 55.7        | 64.1        |
  1   | 61.1, 92.1      | 62.6, 86.7  | 55.9, 87.1  | 63.8, 12.2  | 62.1, 19.8
  2   | 60.5, 93.8      | 63.7, 88.6  | 52.1, 91.0  | 63.5, 6.2   | 62.1, 18.3

One of them on svhn, among 2, 3, 4 and 5 tasks: `dam_robust` 6.5, 6.8, 7.2 and
12.2, task_arithmetic 96.0, 96.8, 94.2 and 92.1, the clean merge 32.0, 29.5,
22.7 and 19.8. The same upload, ablation and curve:

  task_arithmetic              | 61.1 (58.7 to 63.5) | 92.1 (88.3 to 95.1)
  dam_paper, both in turn      | 62.9 (60.5 to 65.3) | 90.3 (86.2 to 93.5)
    M1 only                    | 60.3 (57.9 to 62.7) | 90.6 (86.6 to 93.8)
    M2 only                    | 63.1 (60.7 to 65.4) | 90.6 (86.6 to 93.9)
    joint                      | 61.9 (59.5 to 64.3) | 91.0 (87.1 to 94.1)
    exact gradient             | 62.8 (60.4 to 65.3) | 90.3 (86.2 to 93.5)
  dam_released                 | 61.2 (58.8 to 63.5) | 90.6 (86.6 to 93.9)
  dam_robust                   | 62.9 (60.5 to 65.3) | 5.4 (2.9 to 8.7)
    with safety_weight=0       | 63.4 (61.0 to 65.9) | 87.1 (82.6 to 90.8)
    with safety_weight=0.1     | 63.9 (61.4 to 66.3) | 10.1 (6.6 to 14.2)
    with safety_weight=1       | 60.0 (57.6 to 62.5) | 2.2 (0.7 to 4.6)
    with safety_weight=3       | 58.3 (55.9 to 60.7) | 2.5 (1.1 to 5.1)
    with safety_weight=10      | 57.4 (55.0 to 59.8) | 1.4 (0.4 to 3.6)

Defences of the same upload, 500 dev images a task; seconds on a shared core:

  anp                          | 58.9 (56.4 to 61.3) | 86.7 (82.2 to 90.5) | 320
  fine_pruning                 | 54.8 (52.4 to 57.2) | 80.9 (75.9 to 85.5) | 174
  clp                          | 61.3 (58.9 to 63.6) | 90.6 (86.6 to 94.0) | 2
  i_bau                        | 56.8 (54.4 to 59.1) | 21.2 (16.7 to 26.4) | 276
  ibvs                         | 61.2 (58.8 to 63.5) | 92.1 (88.3 to 95.0) | 64
  lfpm                         | 39.6 (37.4 to 41.9) | 4.3 (2.1 to 7.4)    | 224
  wag                          | 62.6 (60.2 to 64.9) | 86.7 (82.2 to 90.7) | 1
  dam_robust                   | 61.9 (59.4 to 64.3) | 4.3 (2.1 to 7.4)    | 74

The adaptive attacker on svhn, whom the audit does not name (suspicion 0.3), has
42.4 (36.8 to 48.3) of `dam_robust` with 62.5, 91.7 of dam_released, 89.6 of
average, 95.3 of task_arithmetic with 57.0, and 16.2 of the clean merge.

With today's defaults, of an upload made anew, ACC and ASR of `dam_robust`, in
brackets the ASR of the clean merge and of task_arithmetic: adaptive 61.3 (58.9
to 63.6), 16.2 (11.9 to 21.0; 16.9, 97.1), lobam 61.6, 2.1 (7.8, 41.5), blended
62.2, 4.1 (4.9, 19.0).

`--config=configs/study.py:runlocal` is short and shows that all is in place.
"""

from ml_collections import config_dict

from experiments import methods
from experiments import settings


@settings.arguments(runlocal=False)
def get_config(*, runlocal: bool) -> config_dict.ConfigDict:
  """Returns the config.

  Args:
    runlocal: whether the run is to be short.

  Returns:
    The config; `experiments.cells.KEYS` says what each key means.
  """
  c = config_dict.ConfigDict()
  c.pool = '../shared/pool'
  c.nano_pool = '../nano_pool'
  c.nano_tasks = ''
  c.sections = 'succession,transfer' if runlocal else 'all'
  c.attacks = (
    'badnets,badmerging'
    if runlocal
    else 'badnets,blended,sig,wanet,badmerging,badvit,trojvit,lora,lobam,'
    'sparse,badmerging_off_task,merge_backdoor'
  )
  c.attacked = 'svhn' if runlocal else 'svhn,gtsrb'
  c.attack_seeds = 1 if runlocal else 3
  c.merge_seeds = 1 if runlocal else 3
  c.methods = 'static' if runlocal else 'data_free,informed,learned'
  c.tasks = 'cifar100,mnist,gtsrb,svhn,aid,eurosat'
  c.bad = ','.join(
    f'badmerging_{task}' for task in ('cifar100', 'gtsrb', 'svhn', 'eurosat')
  )
  c.bad_counts = '0,1,2,4'
  c.bad_rotations = 1
  c.task_counts = '2,4,6,8'
  c.task_order = 'svhn,mnist,gtsrb,cifar100,aid,eurosat,fashion_mnist'
  c.task_order += ',emnist_letters'
  c.task_bad = 'badmerging_svhn'
  c.number_methods = 'average,ties,dam_robust'
  c.defences = 'repairs,dam_robust'
  c.defence_attacks = 'badnets,badmerging'
  c.defence_images = 64 if runlocal else 500
  c.ablation_attacks = 'badmerging'
  c.curve_attacks = 'badmerging'
  c.safety_weights = '0,0.1,0.3,1,3,10'
  c.adaptive_attacks = 'badmerging,adaptive'
  c.adaptive_methods = 'average,dam_released,dam_robust'
  c.options = {name: methods.config_options(name) for name in methods.ALL}
  c.steps = 4 if runlocal else 300
  c.batch = 16
  c.dev = 64 if runlocal else 0
  c.test = 50 if runlocal else 0
  c.transfer_test = 20 if runlocal else 200
  c.audit = not runlocal
  c.draws = 200 if runlocal else 2000
  c.seed = 0
  return c
