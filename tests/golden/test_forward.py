"""The CLIP image tower, against the reference's forward and backward passes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dam_jax import losses

# A gradient in float32 is a sum of thousands of terms.
_TOLERANCE = {
  'float32': {'': 1e-5},
  'float64': {'': 1e-9},
}


def test_every_activation_is_the_references(
  forward_path, inputs, read, compare, quick_jit
):
  file = read(forward_path)
  file.options(())
  dtype, num = file.dtype, len(inputs.heads)
  models = {'pre': inputs.base}
  models |= {f'ft{k}': x for k, x in enumerate(inputs.experts)}
  ours = {}
  with file.precision():
    pixels = jnp.asarray(inputs.images[0], dtype)

    @functools.partial(quick_jit, static_argnums=1)
    def activations(params, every_token):
      flat = pixels.reshape(-1, *pixels.shape[2:])
      _, state = inputs.tower(
        params, flat, every_token=every_token, capture_intermediates=True
      )
      return state['intermediates']

    def entropy(params, images):
      logits = inputs.logits_fn(params, pixels.at[0].set(images))
      return jnp.mean(losses.entropy(logits[0]))

    mean_entropy = quick_jit(lambda logits: jnp.mean(losses.entropy(logits)))
    for name, vector in models.items():
      params = inputs.unflatten(vector.astype(dtype))
      logits = np.asarray(quick_jit(inputs.logits_fn)(params, pixels))
      lead = pixels.shape[:2]
      pooled = activations(params, False)['post_layernorm']['__call__'][0]
      pooled = np.asarray(pooled).reshape(*lead, -1)
      last = activations(params, True)[
        f'layers_{inputs.config.num_hidden_layers - 1}'
      ]
      tokens = np.asarray(last['__call__'][0])
      tokens = tokens.reshape(*lead, inputs.config.num_tokens, -1)
      ours[f'{name}/last_hidden'] = tokens[num - 1]  # of the last task
      for t, head in enumerate(inputs.heads):
        own = logits[t, :, : head.shape[1]]
        ours[f'{name}/task{t}/pooled'] = pooled[t]
        ours[f'{name}/task{t}/logits'] = own
        ours[f'{name}/task{t}/entropy'] = mean_entropy(own)
      if name == 'pre':
        grads = quick_jit(jax.grad(entropy, argnums=(0, 1)))(params, pixels[0])
        ours['pre/task0/grad_params'] = inputs.flatten(grads[0])
        ours['pre/task0/grad_images'] = grads[1].transpose(0, 3, 1, 2)
  compare(file, ours, _TOLERANCE[dtype.name])
