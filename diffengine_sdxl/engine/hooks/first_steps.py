"""Check in a training's first steps that all that trains gets gradients, changes, and has an effect on the output."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from mmengine.dist import all_gather, get_world_size, is_main_process
from mmengine.hooks import Hook
from torch import Tensor, nn

from diffengine_sdxl.adapters.base import Adapter
from diffengine_sdxl.engine.effect import relative_effects
from diffengine_sdxl.engine.main_process import on_main_process
from diffengine_sdxl.engine.new_words import check_new_words, learned_words
from diffengine_sdxl.engine.runner import ExperimentRunner
from diffengine_sdxl.errors import UserError, listed
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.registry import HOOKS
from diffengine_sdxl.structures import Batch

#: Steps that count until all must be reached: zero convolutions in a row (ControlNet) pass a gradient on one step later
#: each, as the second matrix of a fresh LoRA does.
STEPS = 3
#: Steps after which the hook no longer waits for those that count.
MAX_WAIT = 100
#: Entries of a tensor that are compared before and after a step; of a larger one every n-th, and the first of the
#: largest gradient.
NUM_COMPARED = 2**16
#: In fp16 a smaller update of a zero matrix may be rounded to zero where it computes.
LEAST_FP16_LR = 1e-6
_OFF = 'To train all the same: default_hooks.first_steps=None.'


@dataclass
class Trained:
    """An adapter or a part of the base that trains, and what was seen of it.

    Attributes:
        names: of its tensors, with those of `parameters`, in whose order `reached` and `changed` are, bool [n].
        rows: of the present micro-batch, those that leave it something to learn, bool [B].
        alive: whether the present step counts: there are such rows, in its active range.
        num_steps: that counted.
    """

    name: str
    names: list[str]
    parameters: list[nn.Parameter]
    reached: Tensor
    changed: Tensor
    rows: Tensor | None = None
    alive: bool = False
    num_steps: int = 0
    waited: int = 0
    before: list[tuple[Tensor, Tensor] | None] = field(default_factory=list)


@HOOKS.register_module()
class FirstStepsHook(Hook):
    """Stop a training that does not train what it says, within its first 3 steps; then remove itself.

    A step counts for an adapter if its learning rates are above 0, and its input, its active range and the loss leave
    it something to learn in some row. After three such steps, each tensor that trains must have had a gradient, and
    some must have changed when the optimizer stepped; processes must hold the same weights; and the denoiser's output
    must differ from the one without the adapter, computed as in sampling.

    Raises:
        UserError: what does not train, and why that may be.
    """

    priority = 'NORMAL'

    def __init__(self) -> None:
        self.trained: list[Trained] = []
        self.batch: Batch | None = None
        self._remove: list[Callable[[], None]] = []
        self._start = 0
        self._stepped = False

    def before_train(self, runner: ExperimentRunner) -> None:
        """Check the optimizer's parameters and the words to learn; begin to watch.

        Raises:
            UserError: see the class.
        """
        model, optimizer = runner.bare_model, runner.optim_wrapper.optimizer
        self._start, self.trained = runner.iter, []
        _check_parameters(runner)
        on_main_process(lambda: check_new_words(runner))
        # A group whose rate is 0 by the config is frozen on purpose.
        frozen = {id(p) for group in optimizer.param_groups if group.get('initial_lr', group['lr']) == 0
                  for p in group['params']}
        for name, parameters in model.trainables().items():
            moving = [(n, p) for n, p in parameters if id(p) not in frozen]
            if len(moving) < len(parameters):
                runner.logger.warning(f"{len(parameters) - len(moving)} of {len(parameters)} tensors of '{name}' have "
                                      'a learning rate of 0 and will not change.')
            seen = torch.zeros(len(moving), dtype=torch.bool)
            self.trained.append(Trained(name, [n for n, _ in moving], [p for _, p in moving], seen, seen.clone()))
        self._remove = [model.register_forward_pre_hook(self._note_batch, with_kwargs=True).remove,
                        model.register_forward_hook(lambda _model, _args, losses: _check_losses(losses, runner)).remove,
                        optimizer.register_step_pre_hook(self._before_step).remove,
                        optimizer.register_step_post_hook(self._after_step).remove]
        for trained in self.trained:
            if trained.name in model.adapters:
                self._note_active_range(trained, model.adapters[trained.name])

    def before_train_iter(self, runner: ExperimentRunner, batch_idx: int, data_batch: Any = None) -> None:
        """Forget the step before."""
        self._stepped = False
        for trained in self.trained:
            trained.alive = False

    def after_train_iter(self, runner: ExperimentRunner, batch_idx: int, data_batch: Any = None,
                         outputs: Any = None) -> None:
        """Count the step; decide where enough have been counted.

        Raises:
            UserError: see the class.
        """
        if not self.trained:
            return
        if not self._stepped and getattr(runner.optim_wrapper, 'loss_scaler', None) is None:
            raise _stopped(runner, 'the optimizer made no step')
        if runner.iter + 1 == self._start + STEPS:
            _check_processes(self.trained, runner)
        waiting = False
        for trained in self.trained:
            trained.num_steps += self._stepped and trained.alive and self._has_rate(trained, runner)
            trained.waited += 1
            if trained.num_steps < STEPS and trained.waited < MAX_WAIT:
                waiting = True
            else:
                _check_trained(trained, runner)
        if not waiting:
            self._finish(runner)

    def after_train(self, runner: ExperimentRunner) -> None:
        """Stop watching a training of fewer steps."""
        self.close()

    def close(self) -> None:
        """Stop watching; also called when training fails."""
        for remove in self._remove:
            remove()
        self.trained, self.batch, self._remove = [], None, []

    def _finish(self, runner: ExperimentRunner) -> None:
        """Measure the adapters' effects and say what was found, in one line."""
        trained, batch = self.trained, self.batch
        self.close()
        effects: dict[str, float] = {}
        if is_main_process() and batch is not None:
            effects = relative_effects(runner.bare_model, batch)
        for name, effect in effects.items():
            if effect == 0:
                raise _stopped(runner, f"the denoiser's output with adapter '{name}' is the same as without it, bit "
                                       'for bit: it is merged, switched off or not attached')
        texts = [f"'{t.name}' ({len(t.parameters):,} tensors"
                 + (f', effect {effects[t.name]:.1g} of the output)' if t.name in effects else ')') for t in trained]
        if texts:
            runner.logger.info(f'The first steps train all of {" and ".join(texts)}.')

    def _has_rate(self, trained: Trained, runner: ExperimentRunner) -> bool:
        """Return whether all its learning rates of this step are large enough to change what computes."""
        least = LEAST_FP16_LR if runner.bare_model.compute_dtype == torch.float16 else 0.0
        ids = {id(p) for p in trained.parameters}
        rates = [group['lr'] for group in runner.optim_wrapper.optimizer.param_groups
                 if not ids.isdisjoint(map(id, group['params']))]
        return all(rate is None or rate > least for rate in rates)  # None: Adafactor's relative steps

    def _note_batch(self, model: SDXL, args: Any, kwargs: dict[str, Any]) -> None:
        """Note for whom a micro-batch leaves something to learn."""
        batch: Any = kwargs.get('inputs', args[0] if args else None)
        if not model.training or not isinstance(batch, Batch):
            return
        for trained in self.trained:
            adapter = dict(model.adapters.items()).get(trained.name)
            read = _rows_that_learn(batch, trained.name)
            words = learned_words(adapter) if adapter is not None else {}
            if words:
                read &= rows_with(model, batch, words)
            trained.rows = read
            if bool(read.any()):
                self.batch = batch
                trained.alive |= adapter is None or adapter.active_range == (0, 1)  # else see _note_active_range

    def _note_active_range(self, trained: Trained, adapter: Adapter) -> None:
        """Let a step count only if some row lies in the adapter's active range: note what `contribute` asks."""
        if adapter.active_range == (0, 1):
            return
        contribute = adapter.contribute

        def noted(call: Any, tensors: Any) -> None:
            if call.training and trained.rows is not None:
                trained.alive |= bool((call.gate(adapter.active_range).bool().cpu() & trained.rows).any())
            contribute(call, tensors)
        adapter.contribute = noted  # type: ignore[method-assign]
        self._remove.append(lambda: adapter.__dict__.pop('contribute', None))

    @torch.no_grad()
    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Note which tensors have a gradient, after clipping, and the values where it is largest."""
        self._stepped = True
        for trained in self.trained:
            with_grad = [i for i, p in enumerate(trained.parameters) if p.grad is not None]
            trained.before = [None] * len(trained.parameters)
            if not with_grad:
                continue
            grads: list[Any] = [trained.parameters[i].grad for i in with_grad]
            # One transfer from the device for all.
            reached = torch.stack([norm.double() for norm in torch._foreach_norm(grads, math.inf)]).cpu() > 0
            trained.reached[with_grad] |= reached
            for i, grad, has in zip(with_grad, grads, reached.tolist(), strict=True):
                if has:
                    at = torch.arange(0, grad.numel(), math.ceil(grad.numel() / NUM_COMPARED), device=grad.device)
                    at[0] = grad.flatten().abs().argmax()
                    trained.before[i] = at, trained.parameters[i].flatten()[at]

    @torch.no_grad()
    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Note which tensors the step has changed."""
        for trained in self.trained:
            noted = [(i, entry) for i, entry in enumerate(trained.before) if entry is not None]
            if noted:
                changed = torch.stack([(trained.parameters[i].flatten()[at] != values).any()
                                       for i, (at, values) in noted])
                trained.changed[[i for i, _ in noted]] |= changed.cpu()
            trained.before = []


def rows_with(model: SDXL, batch: Batch, words: Any) -> Tensor:
    """Return which prompts have one of `words` within the tokens that the text encoders read, bool [B]."""
    return torch.tensor([model.reads_word(text, words) for text in batch.text])


def _rows_that_learn(batch: Batch, name: str) -> Tensor:
    """Return the rows whose loss can reach what trains as `name`, bool [B] on the CPU."""
    rows = torch.ones(len(batch), dtype=torch.bool)
    for dropped in (batch.drop.get('text'), batch.drop.get(name)):
        rows &= True if dropped is None else ~dropped.cpu()
    for factor in (batch.weight, batch.mask):
        rows &= True if factor is None else factor.flatten(1 if factor.dim() > 1 else 0).reshape(
            len(batch), -1).any(dim=1).cpu()
    return rows


def _check_losses(losses: Any, runner: ExperimentRunner) -> None:
    """Check that some loss of a training step has a gradient; torch's own error says nothing of why."""
    if torch.is_grad_enabled() and isinstance(losses, dict) and not any(
            isinstance(loss, Tensor) and loss.requires_grad for loss in losses.values()):
        raise _stopped(runner, 'the loss depends on nothing that trains: the adapters are not part of the denoiser, or '
                               'compute without gradients')


def _check_parameters(runner: ExperimentRunner) -> None:
    """Compare the optimizer's parameters, and the flags `requires_grad`, with what the model trains.

    Raises:
        UserError: they differ.
    """
    model = runner.bare_model
    trained = {id(p): name for parameters in model.trainables().values() for name, p in parameters}
    optimized = Counter(id(p) for group in runner.optim_wrapper.optimizer.param_groups for p in group['params'])
    names = {id(p): name for name, p in model.named_parameters()}
    flagged = {id(p) for p in model.parameters() if p.requires_grad}
    averaged = trained if runner.ema is None else {id(p): '' for p in runner.ema.parameters.values()}
    for what, ids in (('are not in the optimizer', trained.keys() - optimized.keys()),
                      ('are in the optimizer twice', {i for i, count in optimized.items() if count > 1}),
                      ('are in the optimizer and not among what trains', optimized.keys() - trained.keys()),
                      ('do not require gradients', trained.keys() - flagged),
                      ('require gradients and are not among what trains', flagged - trained.keys()),
                      ('are not in the EMA', trained.keys() - averaged.keys())):
        if ids:
            which = listed(sorted(names.get(i, '(none of the model)') for i in ids))
            raise _stopped(runner, f'{len(ids)} tensors {what}: {which}')


def _check_processes(owners: list[Trained], runner: ExperimentRunner) -> None:
    """Compare the weights of all processes, by their sums.

    Raises:
        UserError: they differ, so that each process trains for itself.
    """
    if get_world_size() == 1:
        return
    sums = torch.stack([p.detach().double().sum() for trained in owners for p in trained.parameters])
    everyone = all_gather(sums)
    names = [name for trained in owners for name in trained.names]
    for rank, other in enumerate(everyone):
        if differing := [name for name, same in zip(names, (other == everyone[0]).tolist(), strict=True) if not same]:
            raise _stopped(runner, f'process {rank} holds other weights than process 0 in {len(differing)} tensors '
                                   f'({listed(differing)}): their gradients are not averaged')


def _check_trained(trained: Trained, runner: ExperimentRunner) -> None:
    """Decide on one adapter or part.

    Raises:
        UserError: it was never read, some tensors had no gradient, or none has changed.
    """
    if trained.num_steps == 0:
        raise _stopped(runner, f"'{trained.name}' had nothing to learn in {trained.waited} steps: its input was "
                               'dropped in all rows, no caption has its word, or its learning rate is 0')
    total = len(trained.names)
    if missed := [name for name, reached in zip(trained.names, trained.reached.tolist(), strict=True) if not reached]:
        raise _stopped(runner, f"{len(missed)} of {total} tensors of '{trained.name}' had no gradient in "
                               f'{trained.num_steps} steps ({listed(missed)}), so they do not train: the loss does not '
                               'depend on them')
    still = [name for name, changed in zip(trained.names, trained.changed.tolist(), strict=True) if not changed]
    if still:
        text = (f"{len(still)} of {total} tensors of '{trained.name}' have not changed in {trained.num_steps} steps "
                f'({listed(still)}), though they have gradients: updates are lost in rounding (a dtype of half '
                'precision, a tiny learning rate)')
        # Some may be lost on purpose, as those of norms in a training in bf16.
        if 2 * len(still) >= total:
            raise _stopped(runner, f'{text}, or the optimizer steps other tensors')
        runner.logger.warning(f'{text}.')


def _stopped(runner: ExperimentRunner, why: str) -> UserError:
    return UserError(f'Training stopped at step {runner.iter + 1}: {why}. {_OFF}')
