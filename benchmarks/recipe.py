"""Training steps as diffusers' example scripts make them, as a plain loop without accelerate.

't2i' does what examples/t2i_adapter/train_t2i_adapter_sdxl.py does in a step, 'controlnet' what
examples/controlnet/train_controlnet_sdxl.py does, 'lora' what examples/text_to_image/train_text_to_image_lora_sdxl.py
does. diffusers has no script that trains an IP-Adapter for SDXL.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

#: Linear layers that the LoRA script adapts, in each attention.
TARGETS = ['to_k', 'to_q', 'to_v', 'to_out.0']


class Recipe:
    """The modules, the optimizer and the step of one script.

    Args:
        kind: 't2i', 'lora' or 'controlnet'.
        unet: frozen, in the dtype that it computes in; 'lora' adds its layers to it.
        scheduler: config of the base's scheduler.
        network: the T2I-Adapter or ControlNet, in fp32.
        dtype: of autocast, None without: around the network that trains, and around the whole UNet for a LoRA.
        vae: encodes images in every step, in its own dtype; None where the batches hold latents.
        text_encoders: encode tokens in every step ('lora'); None where the batches hold embeddings.
    """

    def __init__(self, kind: str, unet: Any, scheduler: Mapping[str, Any], network: Any = None,
                 dtype: torch.dtype | None = None, vae: Any = None, text_encoders: Any = None, rank: int = 16) -> None:
        from diffusers import DDPMScheduler, EulerDiscreteScheduler
        self.kind, self.unet, self.network, self.dtype, self.vae = kind, unet, network, dtype, vae
        self.text_encoders = text_encoders
        weight = next(unet.parameters())
        self.device, self.weight_dtype = weight.device, weight.dtype
        self.scheduler = (EulerDiscreteScheduler if kind == 't2i' else DDPMScheduler).from_config(dict(scheduler))
        unet.requires_grad_(False).train(kind == 'lora')
        if kind == 'lora':
            add_lora(unet, rank)
        trained = unet if network is None else network.requires_grad_(True).train()
        self.parameters = [p for p in trained.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, weight_decay=1e-2)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda _: 1.0)

    def step(self, batch: Mapping[str, Any]) -> float:
        """Train on one batch; return the loss, which the scripts read back for their progress bar."""
        loss = self.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach().item()

    def loss(self, batch: Mapping[str, Any], noise: Tensor | None = None, t: Tensor | None = None) -> Tensor:
        """Return the loss of a batch, with `noise` [B, 4, h, w] and timesteps `t` [B] in place of drawn ones."""
        latents = self.latents(batch)
        noise = torch.randn_like(latents) if noise is None else noise.to(latents)
        t = self.timesteps(len(latents)) if t is None else t.to(self.device)
        text = self.text(batch)
        added = {'text_embeds': text[1], 'time_ids': batch['time_ids'].to(self.device)}
        if self.kind == 't2i':
            return self._t2i_loss(latents, noise, t.to(self.scheduler.timesteps.dtype), text[0], added, batch)
        noisy = self.scheduler.add_noise(latents, noise, t)
        control = {} if self.network is None else self._control(noisy, t, text[0], added, batch)
        with self.autocast(self.kind == 'lora'):
            prediction = self.unet(noisy.to(self.weight_dtype), t, encoder_hidden_states=text[0],
                                   added_cond_kwargs=added, return_dict=False, **control)[0]
        return functional.mse_loss(prediction.float(), noise.float())

    def latents(self, batch: Mapping[str, Any]) -> Tensor:
        """Return cached latents, or encode the images."""
        if self.vae is None:
            return batch['latents'].to(self.device)
        with torch.no_grad():
            latents = self.vae.encode(batch['img'].to(self.device, self.vae.dtype)).latent_dist.sample()
        return latents * self.vae.config.scaling_factor

    def text(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return cached embeddings, or encode the tokens."""
        if self.text_encoders is None:
            text, pooled = batch['text_embeds'], batch['pooled']
        else:
            with torch.no_grad():
                outputs = [encoder(ids.to(self.device), output_hidden_states=True) for encoder, ids in
                           zip(self.text_encoders, (batch['ids'], batch['ids_2']), strict=True)]
            text, pooled = torch.cat([o.hidden_states[-2] for o in outputs], dim=-1), outputs[1][0]
        return text.to(self.device, self.weight_dtype), pooled.to(self.device, self.weight_dtype)

    def timesteps(self, num: int) -> Tensor:
        """Draw timesteps: cubic for a T2I-Adapter, else uniform."""
        total = self.scheduler.config.num_train_timesteps
        if self.kind != 't2i':
            return torch.randint(0, total, (num,), device=self.device)
        return ((1 - torch.rand(num, device=self.device) ** 3) * total).long().clamp(0, total - 1)

    def autocast(self, enabled: bool = True) -> AbstractContextManager[Any]:
        """Autocast, where accelerate does."""
        return torch.autocast(self.device.type, self.dtype or torch.bfloat16,
                              enabled=enabled and self.dtype is not None)

    def _t2i_loss(self, latents: Tensor, noise: Tensor, t: Tensor, text: Tensor, added: dict[str, Tensor],
                  batch: Mapping[str, Any]) -> Tensor:
        """Return the loss of the denoised latents, weighted by 1 / sigma^2, which is that of the noise."""
        sigmas = self.scheduler.sigmas.to(self.device, latents.dtype)
        steps = self.scheduler.timesteps.to(self.device)
        # The script looks each timestep up, and waits for the device each time.
        sigma = sigmas[[int((steps == one).nonzero().item()) for one in t]].view(-1, 1, 1, 1)
        noisy = self.scheduler.add_noise(latents, noise, t)
        scaled = noisy / (sigma ** 2 + 1) ** 0.5
        with self.autocast():
            features = self.network(batch['conditioning_image'].to(self.device, self.weight_dtype))
        prediction = self.unet(scaled.to(self.weight_dtype), t, encoder_hidden_states=text, added_cond_kwargs=added,
                               down_intrablock_additional_residuals=[f.to(self.weight_dtype) for f in features],
                               return_dict=False)[0]
        denoised = prediction * -sigma + noisy
        error = (denoised.float() - latents.float()) ** 2 * sigma.float() ** -2
        return error.reshape(len(error), -1).mean(dim=1).mean()

    def _control(self, noisy: Tensor, t: Tensor, text: Tensor, added: dict[str, Tensor],
                 batch: Mapping[str, Any]) -> dict[str, Any]:
        with self.autocast():
            down, mid = self.network(
                noisy, t, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False,
                controlnet_cond=batch['conditioning_image'].to(self.device, torch.float32))
        return {'down_block_additional_residuals': [d.to(self.weight_dtype) for d in down],
                'mid_block_additional_residual': mid.to(self.weight_dtype)}


def add_lora(unet: Any, rank: int) -> None:
    """Add a LoRA to a UNet's attentions, its weights in fp32."""
    from peft import LoraConfig
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights='gaussian', target_modules=TARGETS))
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
