"""How good is the embedded model? 200 training captions and all held-out pairs are drawn; a judge, a small CLIP of another seed than
the model's own text encoder, finds the nearest of all real pictures. Between a ceiling (real pictures through the autoencoder) and a
floor (captions shuffled). Run: `make quality`."""
import argparse, json, random
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from diffusers import StableDiffusionPipeline
from tqdm.auto import tqdm
from . import autoencoder, data, diffusion, text
from .assemble import EMBEDDED, QUALITY, table
from .show import sheet

STEPS, GUIDANCE, CAPTIONS = 25, 3., 200

def load_judge():
    "The judge's picture tower."
    tower = text.PictureTower()
    weights = {k.removeprefix('picture.'): v.float() for k, v in load_file(data.HERE/'judge.safetensors').items() if k.startswith('picture.')}
    tower.load_state_dict(weights); return tower.eval()

@torch.no_grad()
def features(judge, pixels): return torch.cat([F.normalize(judge(p), dim=-1) for p in pixels.split(200)])

def percent(hits): return f'{100*sum(hits)/len(hits):.0f} %'

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--model', default=str(EMBEDDED)); p.add_argument('--captions', type=int, default=CAPTIONS)
    p.add_argument('--guidance', type=float, default=GUIDANCE); a = p.parse_args()
    pipe = StableDiffusionPipeline.from_pretrained(a.model, torch_dtype=torch.float32); pipe.set_progress_bar_config(disable=True)
    pipe.to('cuda' if torch.cuda.is_available() else 'cpu')
    judge, (entries, rgba) = load_judge(), data.unpack()
    use = [i for i, e in enumerate(entries) if e['style'] in data.STYLES]
    entries, pixels = [entries[i] for i in use], data.compose(rgba[use], torch.ones(len(use), 3))
    known = features(judge, pixels)
    taught = torch.tensor([e['thing'] in data.things() for e in entries])
    drawn = [i for i in range(len(entries)) if taught[i]]
    held = [i for i in drawn if data.is_held_out(entries[i])]
    seen = random.Random(0).sample([i for i in drawn if not data.is_held_out(entries[i])], a.captions)
    def score(made, wanted):
        "Right thing and right style of the nearest, among all pictures; right thing among the pictures of the things that were taught."
        near = features(judge, made) @ known.T
        best, best_taught = near.argmax(1).tolist(), near.masked_fill(~taught, -1).argmax(1).tolist()
        same = lambda key, found: percent([entries[b][key]==entries[w][key] for b, w in zip(found, wanted)])
        return [same('thing', best), same('style', best), same('thing', best_taught), same('style', best_taught)]
    @torch.no_grad()
    def through(vae, x): return torch.cat([vae.decode(vae.encode(b.to(pipe.device)).latent_dist.mode()).sample.cpu() for b in x.split(20)])
    rows = []
    for name, wanted in (('training pairs', seen), ('held-out pairs', held)):
        captions = [f'{entries[i]["thing"]}, {entries[i]["style"]} style' for i in wanted]
        made = torch.cat([diffusion.draw_prompts(pipe, captions[k:k+20], STEPS, a.guidance) for k in tqdm(range(0, len(captions), 20), desc=name)]).cpu()
        sheet(torch.stack([pixels[wanted], made], 1).flatten(0, 1)[:96], 12, data.WORK/f'quality-{name.split()[0]}.png')
        rows += [[f'{name}, {len(wanted)}', *score(made, wanted)], [f'{name}, ceiling', *score(through(pipe.vae, pixels[wanted]), wanted)],
                 [f'{name}, floor', *score(made, random.Random(1).sample(wanted, len(wanted)))]]
    out = torch.tensor([data.is_held_out(e) for e in entries])
    psnr = autoencoder.psnr(through(pipe.vae, pixels[out]), pixels[out])
    header = ['', 'thing, of all', 'style, of all', 'thing, of those taught', 'style, of those taught']
    note = (f'{STEPS} steps, guidance {a.guidance}, picture k of each batch of 20 from seed k. "Of all": the nearest of {len(entries)} pictures of '
            f'{len({e["thing"] for e in entries})} things; "of those taught": of {len(drawn)} pictures of {len(data.things())} things. '
            f'Autoencoder: PSNR {psnr.mean():.1f} dB on {len(psnr)} held-out pictures (least {psnr.min():.1f}).')
    QUALITY.parent.mkdir(exist_ok=True); QUALITY.write_text(json.dumps(dict(header=header, rows=rows, note=note), indent=1))
    print(table(header, rows), note, sep='\n\n')

if __name__=='__main__': main()
