"""Put the trained parts into the package: the pipeline folder with its model card, a slice of the data, the picture tower.
Run: `make assemble`."""
import json, shutil, tomllib
from string import Template
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel
from . import autoencoder, data, diffusion, text
from .tokenizer import save_tokenizer

EMBEDDED, SLICE = data.ROOT/'sd_deepdive'/'embedded', data.ROOT/'sd_deepdive'/'data'
QUALITY = data.WORK/'quality.json'
SLICE_THINGS = 24

def replace(new, old):
    "Put folder `new` in the place of `old`, its files readable by everyone."
    for file in new.rglob('*.safetensors'): file.chmod(0o644)
    shutil.rmtree(old, ignore_errors=True); new.rename(old)

def parts():
    "The trained networks as diffusers' pipeline, with the tokenizer and the scheduler of Stable Diffusion 1.x."
    unet = next(f for f in (diffusion.FOLDER/'unet', diffusion.FOLDER/'unet-on-the-way') if f.exists())
    return diffusion.pipeline(AutoencoderKL.from_pretrained(autoencoder.FOLDER/'vae'), CLIPTextModel.from_pretrained(text.FOLDER/'text_encoder'),
        save_tokenizer(text.FOLDER/'tokenizer'), UNet2DConditionModel.from_pretrained(unet), PNDMScheduler(skip_prk_steps=True, **diffusion.SCHEDULE))

def save_pipeline(pipe, folder):
    "Half precision, safetensors; the tokenizer as vocab.json and merges.txt; configurations that load in single precision."
    for part in (pipe.vae, pipe.unet, pipe.text_encoder): part.half()
    pipe.save_pretrained(folder)
    shutil.rmtree(folder/'tokenizer'); save_tokenizer(folder/'tokenizer')
    for file in folder.glob('*/config.json'):
        config = {k: v for k, v in json.loads(file.read_text()).items() if k not in ('_name_or_path', '_diffusers_version', 'transformers_version')}
        if 'dtype' in config: config['dtype'] = 'float32'
        file.write_text(json.dumps(config, indent=2) + '\n')

def save_slice(folder):
    "The first things in every style, and the picture tower with its projection and temperature, in half precision."
    entries, rgba = data.unpack()
    use = [i for i, e in enumerate(entries) if e['thing'] in data.things(SLICE_THINGS)]
    unseen = lambda e: data.is_held_out(e) or e['style'] not in data.STYLES
    with data.zipfile.ZipFile(data.PICTURES) as z:
        data.pack([dict(entries[i], held_out=unseen(entries[i])) for i in use], [z.read(entries[i]['file_name']) for i in use], folder/'pictures.zip')
    save_half(text.FOLDER/'picture_tower.safetensors', folder/'picture_tower.safetensors')

def save_half(old, new):
    "A tower's weights in half precision."
    new.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half() for k, v in load_file(old).items()}, new, metadata=dict(side=str(text.SIDE)))

def table(header, rows): return '\n'.join(['| ' + ' | '.join(map(str, r)) + ' |' for r in (header, ['---']*len(header), *rows)])

def card():
    "The model card, filled in from what training and `make quality` recorded."
    sources = tomllib.loads((data.HERE/'sources.toml').read_text())
    read = lambda folder: json.loads((folder/'record.json').read_text()) if (folder/'record.json').exists() else {}
    entries, _ = data.unpack(); count = lambda style: sum(e['style']==style for e in entries)
    packages = table(['what', 'package', 'author', 'licence', 'source', 'pictures'],
        [[f'{s["style"]} style' + ('' if s['style'] in data.STYLES else ' (not trained on)'), f'{s["package"]} {s["version"]}', s['author'], s['license'], s['source'], count(s['style'])]
         for s in sources['pictures']] + [[k, f'{v["package"]} {v["version"]}', v['author'], v['license'], v['source'], ''] for k, v in sources.items() if k!='pictures'])
    held = {s: sorted(t for t, style in data.held_out() if style==s and t in data.things()) for s in data.STYLES}
    quality = QUALITY.exists() and json.loads(QUALITY.read_text())
    return Template((data.HERE/'model_card.md').read_text()).substitute(sources=packages, things=', '.join(data.things()), count=len(data.things()),
        held_out=table(['style', 'things'], [[s, ', '.join(t)] for s, t in held.items()]), held_out_count=sum(map(len, held.values())),
        held_out_all=len(data.held_out()), quality=table(quality['header'], quality['rows']) if quality else '(not measured yet)', quality_note=quality['note'] if quality else '',
        autoencoder=json.dumps(read(autoencoder.FOLDER)), text=json.dumps(read(text.FOLDER)), diffusion=json.dumps(read(diffusion.FOLDER)))

def main():
    new = data.WORK/'embedded.new'; shutil.rmtree(new, ignore_errors=True)
    save_pipeline(parts(), new); (new/'README.md').write_text(card()); replace(new, EMBEDDED)
    new = data.WORK/'data.new'; shutil.rmtree(new, ignore_errors=True); save_slice(new); replace(new, SLICE)
    save_half(text.JUDGE/'picture_tower.safetensors', data.HERE/'judge.safetensors')
    for folder in (EMBEDDED, SLICE):
        files = [f for f in folder.rglob('*') if f.is_file()]
        print(f'{folder.relative_to(data.ROOT)}: {sum(f.stat().st_size for f in files)/1e6:.1f} MB, largest {max(files, key=lambda f: f.stat().st_size).name}')
    print('Now run `make train-word`: the word of lesson 04 belongs to the model that it was trained on, and was removed with it.')

if __name__=='__main__': main()
