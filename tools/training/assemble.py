"""Put the trained parts into the package: the pipeline folder, its model card still without figures of quality, a slice of the data, picture tower
and judge. Run: `make assemble`."""
import json
import shutil
from pathlib import Path

import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from fastcore.script import call_parse
from safetensors.torch import load_file, save_file

from sd_deepdive.drawings import read_drawings, write_drawings
from sd_deepdive.training.data import things
from sd_deepdive.training.diffusion import load_start

from .card import card
from .tokenizer import merges, save_tokenizer

PACKAGE = Path(__file__).parents[2]/'sd_deepdive'
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


@call_parse
def assemble(
    folder: Path = Path('artifacts'),   # of training
    package: Path = PACKAGE,            # gets `embedded` and `data`
):
    "Put the trained parts into the package."
    folder, package = Path(folder), Path(package)
    new, data = folder/'embedded.new', folder/'data.new'
    for part in (new, data): shutil.rmtree(part, ignore_errors=True)
    save_pipeline(folder, new, merges(folder/'packages'))
    save_data(folder, data)
    for file in (package/'data').glob('*'):       # what other commands put there
        if not (data/file.name).exists(): shutil.copy(file, data)
    (new/'README.md').write_text(card(folder))
    replace(new, package/'embedded')              # all of it is there before the first part is replaced
    replace(data, package/'data')
    for part in ('embedded', 'data'):
        files = [f for f in (package/part).rglob('*') if f.is_file()]
        print(f'{part}: {sum(f.stat().st_size for f in files)/1e6:.1f} MB, largest {max(files, key=lambda f: f.stat().st_size).name}')
    print('Now run `make quality` and `make card`; and `make train-word`: the word of lesson 04 belongs to the model that it was trained on.')
