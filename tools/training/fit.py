"""One training loop for every network: steps, EMA, checkpoints that survive a kill, a progress bar, reports."""
import math, os
from pathlib import Path
from typing import Callable
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm.auto import tqdm
from transformers import get_wsd_schedule

def accelerator(precision: str = 'no') -> Accelerator:
    "Processes and precision: started by `accelerate launch` it is one of several, else alone; a GPU is used if there is one."
    if os.environ.get('OMP_NUM_THREADS'): torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))
    return Accelerator(mixed_precision=precision, cpu=not torch.cuda.is_available())

def step_generator(seed: int, step: int) -> torch.Generator:
    "The randomness of one step, the same however often training was broken off and on however many processes it runs."
    return torch.Generator().manual_seed(seed*10_000_019 + step)

def share(batch: dict[str, torch.Tensor], acc: Accelerator) -> dict[str, torch.Tensor]:
    "This process' part of a batch, on its device."
    return {k: v[acc.process_index::acc.num_processes].to(acc.device, non_blocking=True) for k, v in batch.items()}

def save(path: Path, state: dict):
    "Write a checkpoint atomically: under another name first, then renamed."
    path.parent.mkdir(parents=True, exist_ok=True); part = path.with_suffix('.part')
    torch.save(state, part); part.replace(path)

def fit(
    model: nn.Module,       # the network; trained in place, and returned with its EMA weights
    draw: Callable,         # (generator, step) -> batch: a dict of CPU tensors, all as long as the batch
    loss: Callable,         # (model, **batch) -> scalar
    acc: Accelerator, *,
    steps: int,             # optimiser steps in all
    lr: float,              # AdamW's rate, after `warmup` steps; it falls to a fiftieth over the last `decay` of the steps
    folder: Path,           # where `checkpoint.pt` and the reports go; a checkpoint found there is gone on from
    seed: int = 0,
    warmup: int = 100,
    decay: float = .3,
    ema_decay: float = .995,
    weight_decay: float = .01,
    report: Callable | None = None,  # (network with EMA weights, step) -> str, on the main process
    report_every: int = 500,
    save_every: int = 500,
) -> nn.Module:
    "Train `model` for `steps` steps, or go on from the checkpoint in `folder`. A loss that is not finite stops it, batch saved."
    file, main = folder/'checkpoint.pt', acc.is_main_process
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(.9, .99), weight_decay=weight_decay)
    schedule = get_wsd_schedule(optimizer, warmup, round(steps*decay), num_training_steps=steps, min_lr_ratio=.02)
    ema = EMAModel(model.parameters(), decay=ema_decay, use_ema_warmup=False, foreach=True)
    model.to(acc.device); start = 0
    if file.exists():
        state = torch.load(file, map_location='cpu', weights_only=True)
        model.load_state_dict(state['model']); optimizer.load_state_dict(state['optimizer'])
        schedule.load_state_dict(state['schedule']); ema.load_state_dict(state['ema']); start = state['step']
    ema.to(acc.device)
    trained, optimizer = acc.prepare(model, optimizer)

    def averaged(f, *args):
        ema.store(model.parameters()); ema.copy_to(model.parameters()); model.eval()
        with torch.no_grad(): out = f(*args)
        ema.restore(model.parameters()); model.train(); return out
    def checkpoint(step):
        if main: save(file, dict(model=model.state_dict(), optimizer=optimizer.state_dict(), schedule=schedule.state_dict(),
                                 ema=ema.state_dict(), step=step))

    bar, mean = tqdm(range(start, steps), initial=start, total=steps, desc=folder.name, disable=not main, mininterval=5), None
    model.train()
    for step in bar:
        batch = share(draw(step_generator(seed, step), step), acc)
        with acc.autocast(): value = loss(trained, **batch)
        if not math.isfinite(value.item()):
            if main: save(folder/'not_finite.pt', dict(step=step, batch=batch))
            raise FloatingPointError(f'The loss is {value.item()} at step {step}; the batch is in {folder/"not_finite.pt"}. '
                                     'Lower lr and start again: the last checkpoint is kept.')
        optimizer.zero_grad(); acc.backward(value); acc.clip_grad_norm_(trained.parameters(), 1.); optimizer.step(); schedule.step()
        ema.step(model.parameters())
        mean = value.item() if mean is None else .98*mean + .02*value.item()
        bar.set_postfix(loss=f'{mean:.4f}', lr=f'{schedule.get_last_lr()[0]:.1e}', refresh=False)
        if (step+1)%save_every==0: checkpoint(step+1)
        if report and main and ((step+1)%report_every==0 or step+1==steps):
            tqdm.write(f'{folder.name} step {step+1} loss {mean:.4f} {averaged(report, model, step+1)}')
    if start<steps: checkpoint(steps)
    ema.copy_to(model.parameters()); acc.wait_for_everyone()
    return model.eval()
