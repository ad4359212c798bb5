"""Put the trained parts into the package: the pipeline folder with its model card, a slice of the data, picture tower and judge.
Run: `make assemble`."""
import json
import shutil
from pathlib import Path
from string import Template

import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from fastcore.script import call_parse
from safetensors.torch import load_file, save_file

from sd_deepdive.drawings import read_drawings, write_drawings
from sd_deepdive.training.data import styles, things
from sd_deepdive.training.diffusion import load_start
from sd_deepdive.training.sources import held_out_pairs, sources

from .tokenizer import merges, save_tokenizer

HERE, PACKAGE = Path(__file__).parent, Path(__file__).parents[2]/'sd_deepdive'
SCHEDULE = dict(num_train_timesteps=1000, beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear', set_alpha_to_one=False, steps_offset=1)
SLICE_THINGS = 24


def replace(new: Path, old: Path):
    "Put folder `new` in the place of `old`, its files readable by everyone."
    for file in new.rglob('*.safetensors'): file.chmod(0o644)
    beside, before = (old.with_name(f'{old.name}.{end}') for end in ('new', 'old'))
    for folder in (beside, before): shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(new, beside)      # `new` may lie on another disk
    if old.exists(): old.rename(before)
    beside.rename(old)
    for folder in (new, before): shutil.rmtree(folder, ignore_errors=True)


def save_pipeline(folder: Path, to: Path, pairs: list[str]):
    "The trained networks as diffusers' pipeline, the embedded model's where none was trained: half precision; configurations that load in single."
    start = load_start(folder, torch.device('cpu'))
    pipe = StableDiffusionPipeline(
        vae=start.vae, text_encoder=start.text_encoder,
        unet=UNet2DConditionModel.from_pretrained(folder/'diffusion'/'unet'), tokenizer=save_tokenizer(to/'tokenizer', pairs),
        scheduler=PNDMScheduler(skip_prk_steps=True, **SCHEDULE), safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    for part in (pipe.vae, pipe.unet, pipe.text_encoder): part.half()
    pipe.save_pretrained(to)
    shutil.rmtree(to/'tokenizer')
    save_tokenizer(to/'tokenizer', pairs)
    for file in to.glob('*/config.json'):
        config = {k: v for k, v in json.loads(file.read_text()).items() if k not in ('_name_or_path', '_diffusers_version', 'transformers_version')}
        if 'dtype' in config: config['dtype'] = 'float32'
        file.write_text(json.dumps(config, indent=2) + '\n')


def save_half(old: Path, new: Path):
    "A tower's weights in half precision."
    save_file({k: v.half() for k, v in load_file(old).items()}, new)


def save_data(folder: Path, to: Path):
    "The first things in every style; the picture tower with its projection and temperature; the judge."
    to.mkdir(parents=True)
    write_drawings([d for d in read_drawings(folder/'pictures.zip') if d.thing in things(SLICE_THINGS)], to/'pictures.zip')
    save_half(folder/'text'/'picture_tower.safetensors', to/'picture_tower.safetensors')
    save_half(folder/'judge'/'picture_tower.safetensors', to/'judge.safetensors')


def table(header, rows): return '\n'.join(['| ' + ' | '.join(map(str, r)) + ' |' for r in (header, ['---']*len(header), *rows)])


def card(folder: Path) -> str:
    "The model card, filled in from what training and `make quality` recorded."
    read = lambda name: json.loads((folder/name).read_text()) if (folder/name).exists() else {}
    drawn = [d.style for d in read_drawings(folder/'pictures.zip')]
    taught = things(max(n for n, _ in read('diffusion/record.json')['stages']))
    packages = table(['what', 'package', 'author', 'licence', 'source', 'pictures'],
        [[f'{s["style"]} style' + (' (kept back)' if s.get('kept_back') else ''), f'{s["package"]} {s["version"]}', s['author'], s['license'], s['source'],
          drawn.count(s['style'])] for s in sources()['pictures']] +
        [[k, f'{v["package"]} {v["version"]}', v['author'], v['license'], v['source'], ''] for k, v in sources().items() if k != 'pictures'])
    held = {s: sorted(t for t, style in held_out_pairs() if style == s and t in taught) for s in styles()}
    quality = read('quality.json')
    rows = [[f'{pairs}, {row}', f'{thing:.0%}', f'{style:.0%}'] for pairs, measured in quality.items() if isinstance(measured, list) for row, thing, style in measured]
    return Template((HERE/'model_card.md').read_text()).substitute(
        sources=packages, things=', '.join(taught), count=len(taught), styles=', '.join(styles()), held_out=table(['style', 'things'], [[s, ', '.join(t)] for s, t in held.items()]),
        held_out_count=sum(map(len, held.values())), held_out_all=len(held_out_pairs()), quality=table(['', 'thing', 'style'], rows) if rows else '(not measured yet)',
        psnr=f'{quality.get("psnr", 0):.1f}', autoencoder=json.dumps(read('autoencoder/record.json')), text=json.dumps(read('text/record.json')),
        diffusion=json.dumps(read('diffusion/record.json')))


@call_parse
def assemble(
    folder: Path = Path('artifacts'),   # of training
    package: Path = PACKAGE,            # gets `embedded` and `data`
):
    "Put the trained parts into the package."
    folder, package = Path(folder), Path(package)
    new = folder/'embedded.new'
    shutil.rmtree(new, ignore_errors=True)
    save_pipeline(folder, new, merges(folder/'packages'))
    (new/'README.md').write_text(card(folder))
    replace(new, package/'embedded')
    new = folder/'data.new'
    shutil.rmtree(new, ignore_errors=True)
    save_data(folder, new)
    for file in (package/'data').glob('*'):       # what other commands put there
        if not (new/file.name).exists(): shutil.copy(file, new)
    replace(new, package/'data')
    for part in ('embedded', 'data'):
        files = [f for f in (package/part).rglob('*') if f.is_file()]
        print(f'{part}: {sum(f.stat().st_size for f in files)/1e6:.1f} MB, largest {max(files, key=lambda f: f.stat().st_size).name}')
    print('Now run `make train-word`: the word of lesson 04 belongs to the model that it was trained on.')


if __name__ == '__main__': assemble()
