"""Faults that trainers had in public, as changes of a tiny training; where a thread describes one, it stands beside."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kinds import CASES
from torch.utils.checkpoint import checkpoint

from diffengine_sdxl.attention import ImageLayers
from diffengine_sdxl.models import prompt_branches

TEXT = dict(type='LoRA', rank=4, parts=['text_encoder', 'text_encoder_2'])
LORA, T2I, CONTROL = CASES['lora'].config, CASES['t2i_adapter'].config, CASES['controlnet'].config
IP, WORD = CASES['ip_adapter'].config, CASES['textual_inversion'].config
TRANSFORMS = [dict(type='ImagePrompt', source='img', key='reference', size=64), dict(type='Resize', size='$resolution'),
              dict(type='Crop', size='$resolution'), dict(type='ComputeTimeIds'), dict(type='PackInputs')]
Fault = Callable[[Any, pytest.MonkeyPatch], None]


def wrappers(runner: Any, part: str = 'unet') -> list[Any]:
    """Return the LoRA's wrappers in a part."""
    return list(runner.bare_model.adapters['a']._wrappers[part].values())


def trained(runner: Any) -> list[torch.nn.Parameter]:
    return [p for parameters in runner.bare_model.trainables().values() for _, p in parameters]


def reentrant(runner: Any, patch: pytest.MonkeyPatch) -> None:
    """kohya-ss/sd-scripts #91, cloneofsimo/lora #26: checkpointed layers whose inputs have no gradient."""
    for part in ('text_encoder', 'text_encoder_2'):
        for layer in [m for m in getattr(runner.bare_model, part).modules() if type(m).__name__ == 'CLIPEncoderLayer']:
            forward = layer.forward
            patch.setattr(layer, 'forward', lambda *a, f=forward, **k: checkpoint(
                lambda *b: f(*b, **k), *a, use_reentrant=True))


def restored(runner: Any, patch: pytest.MonkeyPatch) -> None:
    """The weights of the beginning are copied back before each step."""
    before = [p.detach().clone() for p in trained(runner)]

    def restore(*_: Any) -> None:
        for parameter, value in zip(trained(runner), before, strict=True):
            parameter.data.copy_(value)
    runner.bare_model.register_forward_pre_hook(restore)


def half_off_in_sampling(runner: Any, patch: pytest.MonkeyPatch) -> None:
    """Half of the layers are left out where images are made."""
    for wrapper in wrappers(runner)[::2]:
        forward, base = wrapper.forward, wrapper.base_layer
        patch.setattr(wrapper, 'forward', lambda x, *a, f=forward, b=base, **k: (
            f if torch.is_grad_enabled() else b)(x, *a, **k))


def half_scaled_by_zero(runner: Any, patch: pytest.MonkeyPatch) -> None:
    for wrapper in wrappers(runner)[::2]:
        wrapper.scaling['a'] = 0.0


def another_copy(runner: Any, patch: pytest.MonkeyPatch) -> None:
    """adapter-hub/adapters #260: the optimizer was built before the weights that compute."""
    for group in runner.optim_wrapper.optimizer.param_groups:
        group['params'] = [copy.deepcopy(p) for p in group['params']]


def not_in_optimizer(runner: Any, patch: pytest.MonkeyPatch) -> None:
    """kohya-ss/sd-scripts #890: --train_text_encoder does nothing."""
    group = runner.optim_wrapper.optimizer.param_groups[0]
    group['params'] = group['params'][:len(group['params']) // 2]


def twice(runner: Any, patch: pytest.MonkeyPatch) -> None:
    """A weight in two groups is stepped twice."""
    groups = runner.optim_wrapper.optimizer.param_groups
    groups[0]['params'].append(groups[0]['params'][0])


def frozen_in_optimizer(runner: Any, patch: pytest.MonkeyPatch) -> None:
    """huggingface/diffusers #855: weight decay changes what should be frozen."""
    weight = runner.bare_model.unet.conv_in.weight
    runner.optim_wrapper.optimizer.param_groups[0]['params'].append(weight)


def half_frozen(runner: Any, patch: pytest.MonkeyPatch) -> None:
    """Another tool froze a part of the weights again."""
    for parameter in trained(runner)[::2]:
        parameter.requires_grad_(False)


def base_trains(runner: Any, patch: pytest.MonkeyPatch) -> None:
    """huggingface/diffusers #507, bmaltais/kohya_ss #2615: weights train that should not."""
    runner.bare_model.text_encoder.get_input_embeddings().weight.requires_grad_(True)


def merged(runner: Any, patch: pytest.MonkeyPatch) -> None:
    for wrapper in wrappers(runner):
        wrapper.merge()


def dead(runner: Any, patch: pytest.MonkeyPatch) -> None:
    """Half of the wrappers have no active adapter."""
    for wrapper in wrappers(runner)[::2]:
        patch.setattr(wrapper, 'forward', wrapper.base_layer.forward)


def detached(runner: Any, patch: pytest.MonkeyPatch) -> None:
    for wrapper in wrappers(runner)[::2]:
        patch.setattr(wrapper, 'forward', torch.no_grad()(wrapper.forward))


def one_detached(runner: Any, patch: pytest.MonkeyPatch) -> None:
    """A single layer of all."""
    wrapper = wrappers(runner)[3]
    patch.setattr(wrapper, 'forward', torch.no_grad()(wrapper.forward))


def both_zero(runner: Any, patch: pytest.MonkeyPatch) -> None:
    """Both matrices begin at zero, so no gradient ever passes."""
    with torch.no_grad():
        for parameter in trained(runner):
            parameter.zero_()


def all_dropped(runner: Any, patch: pytest.MonkeyPatch) -> None:
    """Dropout of everything."""
    for wrapper in wrappers(runner):
        wrapper.lora_dropout['a'] = torch.nn.Threshold(math.inf, 0.0)


def no_scale(runner: Any, patch: pytest.MonkeyPatch) -> None:
    """The wrapper's factor is zero, whatever the adapter says."""
    for wrapper in wrappers(runner):
        wrapper.scaling['a'] = 0.0


def cast_cache(runner: Any, patch: pytest.MonkeyPatch) -> None:
    """A pass without gradients filled autocast's cache, so that casts of the weights have no graph (older torch)."""
    for wrapper in wrappers(runner):
        layer = wrapper.lora_B['a']
        patch.setattr(layer, 'forward', lambda x, layer=layer: torch.nn.functional.linear(x, layer.weight.detach()))


def zeroed(runner: Any, patch: pytest.MonkeyPatch) -> None:
    """Gradients are cleared between the backward pass and the step."""
    wrapper = runner.optim_wrapper
    backward = wrapper.backward

    def forgetful(loss: Any, **kwargs: Any) -> None:
        backward(loss, **kwargs)
        wrapper.optimizer.zero_grad(set_to_none=False)
    patch.setattr(wrapper, 'backward', forgetful)


def clipped_to_zero(runner: Any, patch: pytest.MonkeyPatch) -> None:
    wrapper = runner.optim_wrapper
    clip = wrapper._clip

    def clip_all() -> float:
        norm = float(clip())
        torch._foreach_mul_([p.grad for p in wrapper._parameters() if p.grad is not None], 0.0)
        return norm
    patch.setattr(wrapper, '_clip', clip_all)


def never_steps(runner: Any, patch: pytest.MonkeyPatch) -> None:
    """Accumulation is counted wrongly."""
    patch.setattr(runner.optim_wrapper, 'should_update', lambda: False)


def undone(runner: Any, patch: pytest.MonkeyPatch) -> None:
    """Chatglm_lora_multi-gpu #14: steps are made on a copy (offloaded, fp32) that never comes back."""
    optimizer, before = runner.optim_wrapper.optimizer, [torch.empty(0)]
    optimizer.register_step_pre_hook(lambda *_: before.__setitem__(slice(None), [p.detach().clone() for p in
                                                                                  trained(runner)]))
    optimizer.register_step_post_hook(lambda *_: [p.data.copy_(value) for p, value in zip(
        trained(runner), before, strict=True)])


def rounded(runner: Any, patch: pytest.MonkeyPatch) -> None:
    """Weights in bf16 are too coarse for the learning rate."""
    for parameter in trained(runner):
        parameter.data = parameter.data.bfloat16().float()
    runner.optim_wrapper.optimizer.register_step_post_hook(lambda *_: [
        p.data.copy_(p.data.bfloat16().float()) for p in trained(runner)])


def no_contribution(runner: Any, patch: pytest.MonkeyPatch) -> None:
    """The adapter runs and its output is left out of the UNet's call."""
    patch.setattr(runner.bare_model.adapters['a'], 'contribute', lambda call, tensors: None)


def features_lost(runner: Any, patch: pytest.MonkeyPatch) -> None:
    """Only the first features reach the UNet: the list was popped by a call before."""
    net = runner.bare_model.adapters['a'].net
    forward = net.forward
    patch.setattr(net, 'forward', lambda *a, **k: [f if i < 2 else f.detach() for i, f in enumerate(forward(*a, **k))])


def no_image_values(runner: Any, patch: pytest.MonkeyPatch) -> None:
    """The processors project the image's values without gradients."""
    patch.setattr(ImageLayers, 'weights', property(lambda layers: (layers.to_k.weight, layers.to_v.weight.detach())))


def tokens_cut_off(runner: Any, patch: pytest.MonkeyPatch) -> None:
    """The projection runs without gradients, as if it belonged to the frozen encoder."""
    adapter = runner.bare_model.adapters['a']
    patch.setattr(adapter, 'project', torch.no_grad()(adapter.project))


def hint_lost(runner: Any, patch: pytest.MonkeyPatch) -> None:
    """A ControlNet without its hint."""
    embedding = runner.bare_model.adapters['a'].net.controlnet_cond_embedding
    patch.setattr(embedding, 'forward', lambda x, f=embedding.forward: f(x).detach())


def other_row(runner: Any, patch: pytest.MonkeyPatch) -> None:
    """The gradient goes to another token's row."""
    adapter = runner.bare_model.adapters['a']
    tokens = adapter.new_tokens
    patch.setattr(adapter, 'new_tokens', lambda: {word: tuple(v if v is None else v.detach() for v in pair)
                                                  for word, pair in tokens().items()})


def cached_text(runner: Any, patch: pytest.MonkeyPatch) -> None:
    """kohya-ss/sd-scripts #2191: the text encoders' outputs are cached though they train."""
    embed = prompt_branches.embed
    patch.setattr(prompt_branches, 'embed', lambda *a, **k: tuple(x.detach() for x in embed(*a, **k)))


def never_read(runner: Any, patch: pytest.MonkeyPatch) -> None:
    """A layer is trained whose output SDXL doesn't read: the last one of the first text encoder."""
    # Before the model is built: see the test.


def stale_average(runner: Any, patch: pytest.MonkeyPatch) -> None:
    """wandb/senpai #2899, Nerogar/OneTrainer #889: the EMA follows other tensors."""
    ema = next(hook for hook in runner.hooks if type(hook).__name__ == 'EMAHook')
    before = ema.before_run

    def of_copies(runner: Any) -> None:
        before(runner)
        ema.parameters = {name: copy.deepcopy(p) for name, p in ema.parameters.items()}
    patch.setattr(ema, 'before_run', of_copies)


def off_in_sampling(runner: Any, patch: pytest.MonkeyPatch) -> None:
    """unslothai/unsloth #2142, kohya-ss/musubi-tuner #66: it trains and changes no image."""
    adapter = runner.bare_model.adapters['a']
    contribute = adapter.contribute
    patch.setattr(adapter, 'contribute', lambda call, t: contribute(call, t) if call.training else None)


def lora_off_in_sampling(runner: Any, patch: pytest.MonkeyPatch) -> None:
    for wrapper in wrappers(runner):
        forward, base = wrapper.forward, wrapper.base_layer
        patch.setattr(wrapper, 'forward', lambda x, *a, f=forward, b=base, **k: (
            f if torch.is_grad_enabled() else b)(x, *a, **k))


def loss_cut_off(runner: Any, patch: pytest.MonkeyPatch) -> None:
    """The loss no longer depends on the denoiser, but has a gradient."""
    objective = runner.bare_model.objective
    patch.setattr(runner.bare_model, 'objective', lambda model, batch: {
        'loss': objective(model, batch)['loss'].detach() + 0.0 * sum(p.sum() for p in trained(runner))})


#: Fault, adapter, words of the error.
FAULTS: list[tuple[Fault, dict[str, Any], str]] = [
    (reentrant, TEXT, 'depends on nothing'), (another_copy, LORA, 'not in the optimizer'),
    (not_in_optimizer, LORA, 'not in the optimizer'), (twice, LORA, 'twice'),
    (frozen_in_optimizer, LORA, 'not among what trains'), (half_frozen, LORA, 'do not require gradients'),
    (base_trains, WORD, 'require gradients and are not among'), (merged, LORA, 'depends on nothing'),
    (dead, LORA, 'had no gradient'), (detached, LORA, 'had no gradient'), (one_detached, LORA, 'of 176 tensors'),
    (both_zero, LORA, 'had no gradient'), (all_dropped, LORA, 'had no gradient'), (no_scale, LORA, 'had no gradient'),
    (cast_cache, LORA, 'had no gradient'), (zeroed, LORA, 'had no gradient'),
    (clipped_to_zero, LORA, 'had no gradient'), (never_steps, LORA, 'made no step'), (undone, T2I, 'have not changed'),
    (rounded, LORA, 'lost in rounding'), (no_contribution, T2I, 'depends on nothing'),
    (features_lost, T2I, 'had no gradient'), (no_contribution, IP, 'depends on nothing'),
    (no_image_values, IP, 'had no gradient'), (tokens_cut_off, IP, 'had no gradient'),
    (no_contribution, CONTROL, 'depends on nothing'), (hint_lost, CONTROL, 'had no gradient'),
    (other_row, WORD, 'depends on nothing'), (cached_text, TEXT, 'depends on nothing'),
    (never_read, TEXT, 'had no gradient'),
    (stale_average, LORA, 'not in the EMA'), (off_in_sampling, T2I, 'the same as without it'),
    (lora_off_in_sampling, LORA, 'the same as without it'),
    (half_off_in_sampling, LORA, '44 layers of adapter'), (half_scaled_by_zero, LORA, 'had no gradient'),
    (restored, T2I, 'something sets them between the steps'), (loss_cut_off, LORA, 'had no gradient')]
