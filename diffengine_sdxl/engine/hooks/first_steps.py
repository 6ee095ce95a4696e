"""Check in a training's first steps that all that trains gets gradients, changes, and has an effect on the output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from mmengine.dist import all_gather, get_world_size, is_main_process
from mmengine.hooks import Hook
from torch import Tensor

from diffengine_sdxl.adapters.base import Adapter
from diffengine_sdxl.engine.effect import find_idle, relative_effects
from diffengine_sdxl.engine.main_process import on_main_process
from diffengine_sdxl.engine.new_words import check_new_words, learned_words
from diffengine_sdxl.engine.runner import ExperimentRunner
from diffengine_sdxl.engine.watched_parameters import WatchedParameters
from diffengine_sdxl.errors import UserError, listed
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.registry import HOOKS
from diffengine_sdxl.structures import Batch

#: Steps that count until all must be reached: zero convolutions in a row (ControlNet) pass a gradient on one step later
#: each, as the second matrix of a fresh LoRA does.
STEPS = 3
#: Steps after which the hook no longer waits for those that count.
MAX_WAIT = 100
#: In fp16 a smaller update of a zero matrix may be rounded to zero where it computes.
LEAST_FP16_LR = 1e-6
#: A smaller part of the full learning rate, early in a warmup, may be lost in rounding though later steps are not.
LEAST_RATE = 0.1
_OFF = 'To train all the same: default_hooks.first_steps=None.'


@HOOKS.register_module()
class FirstStepsHook(Hook):
    """Stop a training that does not train what it says, within its first 3 steps; then remove itself.

    A step counts for an adapter if its learning rates are above 0, and its input, its active range and the loss leave
    it something to learn in some row. After three such steps, each tensor that trains must have had a gradient, and at
    least half of them must have changed when the optimizer stepped; processes must hold the same weights; and the
    denoiser's output must differ from the one without the adapter, computed as in sampling.

    Raises:
        UserError: what does not train, and why that may be.
    """

    priority = 'NORMAL'

    def __init__(self) -> None:
        self.watched: list[WatchedParameters] = []
        self.batch: Batch | None = None
        self._remove: list[Callable[[], None]] = []
        self._start = 0
        self._stepped = False
        self._moved: str | None = None

    def before_train(self, runner: ExperimentRunner) -> None:
        """Check the optimizer's parameters and the words to learn; begin to watch.

        Raises:
            UserError: see the class.
        """
        model, optimizer = runner.bare_model, runner.optim_wrapper.optimizer
        self._start, self.watched = runner.iter, []
        _check_parameters(runner)
        on_main_process(lambda: check_new_words(runner))
        # A group whose rate is 0 by the config is frozen on purpose.
        frozen = {id(p) for group in optimizer.param_groups if _full_rate(group) == 0 for p in group['params']}
        for name, parameters in model.trainables().items():
            moving = [(n, p) for n, p in parameters if id(p) not in frozen]
            if len(moving) < len(parameters):
                runner.logger.warning(f"{len(parameters) - len(moving)} of {len(parameters)} tensors of '{name}' have "
                                      'a learning rate of 0 and will not change.')
            if moving:
                self.watched.append(WatchedParameters(name, [n for n, _ in moving], [p for _, p in moving]))
        self._remove = [model.register_forward_pre_hook(self._note_batch, with_kwargs=True).remove,
                        model.register_forward_hook(lambda _model, _args, losses: _check_losses(losses, runner)).remove,
                        optimizer.register_step_pre_hook(self._before_step).remove,
                        optimizer.register_step_post_hook(self._after_step).remove]
        for watched in self.watched:
            if watched.name in model.adapters:
                self._note_active_range(watched, model.adapters[watched.name], watched.name in model.partners)

    def before_train_iter(self, runner: ExperimentRunner, batch_idx: int, data_batch: Any = None) -> None:
        """Forget the step before."""
        self._stepped = False
        for watched in self.watched:
            watched.alive = False

    def after_train_iter(self, runner: ExperimentRunner, batch_idx: int, data_batch: Any = None,
                         outputs: Any = None) -> None:
        """Count the step; decide where enough have been counted.

        Raises:
            UserError: see the class.
        """
        if not self.watched:
            return
        runner.settle()  # costs nothing here: `_before_step` waits, too
        if not self._stepped and getattr(runner.optim_wrapper, 'loss_scaler', None) is None:
            raise _stopped(runner, 'the optimizer made no step')
        if self._moved is not None:
            raise _stopped(runner, self._moved)
        if runner.iter + 1 == self._start + STEPS:
            _check_processes(self.watched, runner)
        waiting = False
        for watched in self.watched:
            watched.num_steps += self._stepped and watched.alive and _has_rate(watched, runner)
            watched.waited += 1
            if watched.num_steps < STEPS and watched.waited < MAX_WAIT:
                waiting = True
            else:
                _check_watched(watched, runner)
        if not waiting:
            self._finish(runner)

    def after_train(self, runner: ExperimentRunner) -> None:
        """Stop watching a training of fewer steps; warn of what had nothing to learn in it."""
        for watched in self.watched:
            if watched.num_steps == 0 and watched.waited:
                runner.logger.warning(f'{_nothing_to_learn(watched)}. It is as it was.')
        self.close()

    def close(self) -> None:
        """Stop watching; also called when training fails."""
        for remove in self._remove:
            remove()
        self.watched, self.batch, self._remove = [], None, []

    def _finish(self, runner: ExperimentRunner) -> None:
        """Measure the adapters' effects and say what was found, in one line."""
        model, watched, batch = runner.bare_model, self.watched, self.batch
        self.close()
        effects: dict[str, float] = {}
        if is_main_process() and batch is not None:
            # What had no gradient yet may still do nothing.
            untrained = [name for one in watched for name in one.zeros()]
            with runner.exported_weights():
                effects = relative_effects(model, batch)
                fault = find_idle(model, batch, effects, untrained)
            if fault is not None:
                raise _stopped(runner, f'{fault}: merged, switched off or not attached')
        texts = []
        for one in watched:
            adapter = dict(model.adapters.items()).get(one.name)
            where = f' on {adapter.attach_point}' if adapter is not None and adapter.modifies_base else ''
            effect = f', effect {effects[one.name]:.1g} of the output' if one.name in effects else ''
            texts.append(f"'{one.name}'{where} ({len(one.parameters):,} tensors{effect})")
        if texts:
            runner.logger.info(f'The first steps train all of {" and ".join(texts)}.')

    def _note_batch(self, model: SDXL, args: Any, kwargs: dict[str, Any]) -> None:
        """Note for whom a micro-batch leaves something to learn."""
        batch: Any = kwargs.get('inputs', args[0] if args else None)
        if not model.training or not isinstance(batch, Batch):
            return
        for watched in self.watched:
            adapter = dict(model.adapters.items()).get(watched.name)
            words = learned_words(adapter) if adapter is not None else {}
            reads_text = bool(words) or any(name.startswith('text_encoder') for name in watched.names)
            watched.rows = _rows_that_learn(batch, [watched.name, *(['text'] if reads_text else [])])
            if words:
                watched.rows &= torch.tensor([model.reads_word(text, words) for text in batch.text])
            if bool(watched.rows.any()):
                self.batch = batch
                always = adapter is None or adapter.active_range == (0, 1) and watched.name not in model.partners
                watched.alive |= always  # else see _note_active_range

    def _note_active_range(self, watched: WatchedParameters, adapter: Adapter, is_drawn: bool) -> None:
        """Let a step count only if some row lies in the adapter's active range: note what `contribute` asks."""
        if adapter.active_range == (0, 1) and not is_drawn:
            return
        contribute = adapter.contribute

        def noted(call: Any, tensors: Any) -> None:
            if call.training and watched.rows is not None:
                gate = call.gate(adapter.active_range, adapter.name)  # None in a pass that draws no partners
                watched.alive |= bool((watched.rows if gate is None else gate.bool().cpu() & watched.rows).any())
            contribute(call, tensors)
        adapter.contribute = noted  # type: ignore[method-assign]
        self._remove.append(lambda: adapter.__dict__.pop('contribute', None))

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        # The kernel of a fused optimizer is called in any case, and leaves out the step where this is 1.
        found_inf = getattr(optimizer, 'found_inf', None)
        self._stepped = found_inf is None or not bool(found_inf)
        for watched in self.watched if self._stepped else ():
            self._moved = watched.before_step() or self._moved

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        for watched in self.watched if self._stepped else ():
            watched.after_step()


def _rows_that_learn(batch: Batch, drops: list[str]) -> Tensor:
    """Return the rows whose loss can reach what is dropped by one of `drops`, bool [B] on the CPU."""
    rows = torch.ones(len(batch), dtype=torch.bool)
    for dropped in (batch.drop.get(name) for name in drops):
        rows &= True if dropped is None else ~dropped.cpu()
    for factor in (batch.weight, batch.mask):
        rows &= True if factor is None else factor.reshape(len(batch), -1).ne(0).any(dim=1).cpu()
    return rows


def _full_rate(group: dict[str, Any]) -> float | None:
    """Return a group's learning rate without its schedule; None: Adafactor's relative steps."""
    rate: float | None = group.get('initial_lr', group['lr'])
    return rate


def _groups(watched: WatchedParameters, runner: ExperimentRunner) -> list[dict[str, Any]]:
    ids = {id(p) for p in watched.parameters}
    return [group for group in runner.optim_wrapper.optimizer.param_groups
            if not ids.isdisjoint(map(id, group['params']))]


def _has_rate(watched: WatchedParameters, runner: ExperimentRunner) -> bool:
    """Return whether all learning rates of this step are large enough to change what computes."""
    least = LEAST_FP16_LR if runner.bare_model.compute_dtype == torch.float16 else 0.0
    return all(group['lr'] is None or group['lr'] > least for group in _groups(watched, runner))


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


def _check_processes(owners: list[WatchedParameters], runner: ExperimentRunner) -> None:
    """Compare the weights of all processes, by their sums.

    Raises:
        UserError: they differ, so that each process trains for itself.
    """
    if get_world_size() == 1:
        return
    sums = torch.stack([p.detach().double().sum() for watched in owners for p in watched.parameters])
    everyone = all_gather(sums)
    names = [name for watched in owners for name in watched.names]
    for rank, other in enumerate(everyone):
        if differing := [name for name, same in zip(names, (other == everyone[0]).tolist(), strict=True) if not same]:
            raise _stopped(runner, f'process {rank} holds other weights than process 0 in {len(differing)} tensors '
                                   f'({listed(differing)}): their gradients are not averaged')


def _check_watched(watched: WatchedParameters, runner: ExperimentRunner) -> None:
    """Decide on one adapter or part.

    Raises:
        UserError: it was never read, some tensors had no gradient, or at least half have not changed.
    """
    if watched.num_steps == 0:
        raise _stopped(runner, _nothing_to_learn(watched))
    total, which = len(watched.names), f"tensors of '{watched.name}'"
    if missing := watched.missing():
        raise _stopped(runner, f'{len(missing)} of {total} {which} had no gradient in {watched.num_steps} steps '
                               f'({listed(missing)}), so they do not train: the loss does not depend on them')
    if zeros := watched.zeros():
        runner.logger.warning(f'The gradients of {len(zeros)} of {total} {which} were zero in {watched.num_steps} '
                              f'steps ({listed(zeros)}). In half precision, or with attention over a single token, '
                              'this may be right.')
    warming_up = any(full and group['lr'] < LEAST_RATE * full for group in _groups(watched, runner)
                     if (full := _full_rate(group)) is not None)
    still = [] if warming_up else watched.unchanged()
    if still:
        text = (f'{len(still)} of {total} {which} have not changed in {watched.num_steps} steps ({listed(still)}), '
                'though they have gradients: updates are lost in rounding (half precision, a tiny learning rate)')
        # Some may be lost on purpose, as those of norms in a training in bf16.
        if 2 * len(still) >= total:
            raise _stopped(runner, f'{text}, or the optimizer steps other tensors')
        runner.logger.warning(f'{text}.')


def _nothing_to_learn(watched: WatchedParameters) -> str:
    return (f"'{watched.name}' had nothing to learn in {watched.waited} steps: its input was dropped in all rows, no "
            'step lay in its active range, model.partners drew it off, no caption has its word, or its learning rate '
            'is 0')


def _stopped(runner: ExperimentRunner, why: str) -> UserError:
    return UserError(f'Training stopped at step {runner.iter + 1}: {why}. {_OFF}')
