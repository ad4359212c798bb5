"""How fast the networks by hand are beside the library's: both in one run, in turn, medians of many (lesson 25); `make bench`.

Writes sd_deepdive/data/by_hand.json, which lesson 17 shows. Same scheduler, same number of UNet calls, same threads and
memory format for both, no progress bar. Leave the machine alone while it runs.
"""
import argparse, datetime, json, os, platform, subprocess, sys, warnings
from dataclasses import replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from sd_deepdive.further.speed import in_turn, paired
from sd_deepdive.latents import make_img
from sd_deepdive.models import load_pipeline
from sd_deepdive.places import embedded_folder
from sd_deepdive.sampling import make_samples
from sd_deepdive.scratch.parts import load_parts
from sd_deepdive.scratch.unet import Transformer, UNet
from sd_deepdive.seeds import generators

RECORD, FULL_SIZE = Path(__file__).parents[1]/'sd_deepdive'/'data'/'by_hand.json', Path(__file__).with_name('full_size.py')
PROMPT, STEPS, G = 'octopus, 3d style', 25, 7.5


def draw_library(pipe, batch):
    "Prompt to pictures, the library's way."
    return pipe([PROMPT]*batch, num_inference_steps=STEPS, guidance_scale=G, generator=generators(range(batch))).images


def draw(parts, batch):
    "Prompt to pictures by hand."
    return [make_img(p) for p in make_samples(parts, [PROMPT]*batch, guidance_scale=G, seeds=range(batch), num_inference_steps=STEPS, batch_size=batch)]


class TextEveryTime:
    "The UNet by hand, reading the text at every call."
    def __init__(self, unet): self.unet, self.config, self.dtype, self.device = unet, unet.config, unet.dtype, unet.device
    def __call__(self, *args, **kw): return self.unet(*args, **kw)


class AsConvolutions(Transformer):
    "The transformer with its two linear layers as 1 x 1 convolutions."
    def forward(self, x, text):
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks: h = block(h, text)
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, x.shape[2:]))


def traced(parts, batch):
    "The same parts with the UNet traced and frozen, its text read at every call, as a graph wants plain tensors."
    n, side, c = 2*batch, parts.side//parts.factor, parts.unet.config
    args = (torch.randn(n, c.in_channels, side, side), torch.tensor(500), torch.randn(n, 77, c.cross_attention_dim))
    class Plain(torch.nn.Module):
        def __init__(self, unet): super().__init__(); self.unet = unet
        def forward(self, *args): return self.unet(*args)[0]
    with torch.no_grad(), warnings.catch_warnings(action='ignore'):     # of the tracer, that sizes become constants
        graph = torch.jit.freeze(torch.jit.trace(Plain(parts.unet).eval(), args, check_trace=False))
    return replace(parts, unet=Graph(graph, parts.unet))


class Graph:
    "A graph that is called as a UNet is."
    def __init__(self, graph, unet): self.graph, self.config, self.dtype, self.device = graph, unet.config, unet.dtype, unet.device
    def __call__(self, x, t, encoder_hidden_states):
        return type('Predicted', (), dict(sample=self.graph(x, torch.as_tensor(t), encoder_hidden_states)))


def as_convolutions(parts):
    "The same parts with 1 x 1 convolutions in the transformers."
    unet = UNet.from_pretrained(embedded_folder()/'unet', parts.device)
    for layer in unet.modules():
        if type(layer) is Transformer: layer.__class__ = AsConvolutions
    return replace(parts, unet=unet)


def calls_of(draw_, unet):
    "How often a drawing asks the UNet."
    n = []
    hook = unet.register_forward_hook(lambda *_: n.append(1)); draw_(); hook.remove()
    return len(n)


def embedded(batch, times):
    "Prompt to picture on the embedded model: every arm in one run."
    pipe = load_pipeline(device='cpu', safety_checker=False); pipe.set_progress_bar_config(disable=True)
    parts, last = load_parts(device='cpu'), load_parts(device='cpu', memory_format=torch.channels_last)
    theirs = load_pipeline(device='cpu', safety_checker=False); theirs.set_progress_bar_config(disable=True)
    for part in (theirs.unet, theirs.vae): part.to(memory_format=torch.channels_last)
    assert calls_of(lambda: draw_library(pipe, 1), pipe.unet) == calls_of(lambda: draw(parts, 1), parts.unet) == STEPS + 1
    graph = traced(parts, batch)
    convolutions, every_time = as_convolutions(parts), replace(parts, unet=TextEveryTime(parts.unet))
    plain = replace(convolutions, unet=TextEveryTime(convolutions.unet))
    arms = {'library': lambda: draw_library(pipe, batch), 'by hand': lambda: draw(parts, batch),
            'by hand, text read at every call': lambda: draw(every_time, batch),
            'by hand, 1 x 1 convolutions': lambda: draw(convolutions, batch), 'by hand, neither': lambda: draw(plain, batch),
            'library, channels last': lambda: draw_library(theirs, batch), 'by hand, channels last': lambda: draw(last, batch),
            'by hand, UNet traced': lambda: draw(graph, batch)}
    return paired(in_turn(arms, times), 'library')


def full_sizes(times):
    "Both arms at full size, a process each, in turn."
    found = {arm: dict(seconds=[], peak=[]) for arm in ('library', 'by hand')}
    for i in tqdm(range(times), leave=False):
        for arm in list(found)[::1 if i%2 else -1]:
            out = subprocess.run([sys.executable, FULL_SIZE, arm, str(torch.get_num_threads()), '2'], capture_output=True, text=True, check=True).stdout
            one = json.loads(out)
            found[arm]['seconds'] += one['seconds']; found[arm]['peak'].append(one['peak'])
    record = paired({arm: f['seconds'] for arm, f in found.items()}, 'library')
    for arm, f in found.items(): record[arm]['peak'] = max(f['peak'])
    return record


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--threads', type=int, default=os.cpu_count()); parser.add_argument('--times', type=int, default=30)
    parser.add_argument('--full', type=int, default=3, help='processes for each arm at full size')
    parser.add_argument('--only', choices=['batch_1', 'batch_8', 'full_size'], help='measure this part alone, and keep the rest of the record')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    parts = dict(batch_1=lambda: embedded(1, args.times), batch_8=lambda: embedded(8, max(2, args.times//5)), full_size=lambda: full_sizes(args.full))
    kept = json.loads(RECORD.read_text()) if args.only and RECORD.exists() else {}
    record = dict(date=datetime.date.today().isoformat(), threads=args.threads, torch=torch.__version__, python=platform.python_version(), machine=machine())
    if other := [name for name in ('machine', 'threads', 'torch') if kept and kept.get(name) != record[name]]:
        parser.exit(1, f'{RECORD} is of another {" and ".join(other)}. Measure all of it, without --only.\n')
    record = kept | record | {name: measure() for name, measure in parts.items() if args.only in (None, name)}
    for name, arms in record.items():
        if not isinstance(arms, dict): continue
        print(f'\n{name}')
        for arm, r in arms.items(): print(f'{arm:34} {1000*r["median"]:8.0f} ms   {r["ratio"]:.2f} times as fast as the library' + (f'   {r["peak"]:.0f} MB' if 'peak' in r else ''))
    part = RECORD.with_suffix('.part'); part.write_text(json.dumps(record, indent=1) + '\n'); part.replace(RECORD)


def machine():
    "The processor, in words."
    names = [line.split(':')[1].strip() for line in Path('/proc/cpuinfo').read_text().splitlines() if line.startswith('model name')] if Path('/proc/cpuinfo').exists() else []
    return f'{len(names) or os.cpu_count()} cores, {names[0] if names else platform.processor()}'


if __name__ == '__main__': main()
