"""Weights on their way, small enough to commit: training that goes on another day, on another machine, starts from them.
`make keep` writes them from artifacts/, `make restore` puts them back. What an optimiser remembers stays in the checkpoint."""
import shutil
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from fastcore.script import call_parse
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from sd_deepdive.places import embedded_folder

from .assemble import replace

KEPT = Path(__file__).parent/'on_the_way'
TOWERS = 'text', 'judge'
TABLE = 'embeddings.token_embedding.weight'


def keep(folder: Path, to: Path = KEPT):
    "Half precision: the UNet's averaged weights; the text encoder, of its table only the rows that are not zero; its picture tower; the judge."
    new = folder/'on_the_way.new'
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    unet = UNet2DConditionModel.from_pretrained(folder/'diffusion'/'on-the-way')
    save_file({name: w.half().contiguous() for name, w in unet.state_dict().items()}, new/'unet.safetensors')
    text = CLIPTextModel.from_pretrained(folder/'text'/'text_encoder').state_dict()
    table = text.pop(next(name for name in text if name.endswith(TABLE)))
    rows = table.abs().sum(1).nonzero().flatten()
    text = {name: w.half() for name, w in text.items() if w.is_floating_point()} | dict(rows=rows.int(), values=table[rows].half())
    save_file({name: w.contiguous() for name, w in text.items()}, new/'text_encoder.safetensors')
    for name in TOWERS:
        tower = load_file(folder/name/'picture_tower.safetensors')
        save_file({name: w.half() for name, w in tower.items()}, new/f'{name}_tower.safetensors')
    shutil.copy(folder/'text'/'record.json', new)
    replace(new, to)


def restore(folder: Path, kept: Path = KEPT):
    "What `keep` wrote, as training expects it: `text/`, `judge/` and a UNet in `diffusion/on-the-way` for `--weights`."
    if not (kept/'unet.safetensors').exists(): raise FileNotFoundError(f'{kept} holds no weights: `make keep` writes them.')
    unet = UNet2DConditionModel.from_pretrained(embedded_folder()/'unet').float()
    unet.load_state_dict({name: w.float() for name, w in load_file(kept/'unet.safetensors').items()})
    unet.save_pretrained(folder/'diffusion'/'on-the-way')
    text = CLIPTextModel.from_pretrained(embedded_folder()/'text_encoder').float()
    saved = {name: w.float() if w.is_floating_point() else w.long() for name, w in load_file(kept/'text_encoder.safetensors').items()}
    name = next(name for name in text.state_dict() if name.endswith(TABLE))
    table = torch.zeros_like(text.state_dict()[name])
    table[saved.pop('rows')] = saved.pop('values')
    text.load_state_dict(saved | {name: table})
    text.save_pretrained(folder/'text'/'text_encoder')
    for name in TOWERS:
        (folder/name).mkdir(parents=True, exist_ok=True)
        save_file(load_file(kept/f'{name}_tower.safetensors'), folder/name/'picture_tower.safetensors')
    (folder/'text'/'record.json').write_text((kept/'record.json').read_text())


@call_parse
def main(
    action: str,                        # keep or restore
    folder: Path = Path('artifacts'),   # of training
):
    "Keep weights on their way, or restore them."
    actions = dict(keep=keep, restore=restore)
    if action not in actions: raise SystemExit(f'action={action!r}: give one of {", ".join(actions)}.')
    actions[action](Path(folder))
