"""One guided call of a UNet in Stable Diffusion's shape, random weights, latents of 64 x 64: seconds of each call, and peak memory of the process.

Usage: python bench/full_size.py 'library' | 'by hand' THREADS CALLS. Each way imports only what it needs.
"""
import json, resource, sys, time

import torch


def main(way, threads, calls):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if way == 'library': from diffusers import UNet2DConditionModel as UNet
    else: from sd_deepdive.scratch.unet import UNet
    shape = dict(sample_size=64, cross_attention_dim=768)     # all else is Stable Diffusion's by default
    unet = (UNet(**shape) if way == 'library' else UNet(shape)).eval().requires_grad_(False)
    latents, text, took = torch.randn(2, 4, 64, 64), torch.randn(2, 77, 768), []
    with torch.no_grad():
        words = text if way == 'library' else unet.read(text)
        for _ in range(calls + 1):
            start = time.perf_counter()
            unet(latents, torch.tensor(500), encoder_hidden_states=words)
            took.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/(2**20 if sys.platform == 'darwin' else 2**10)     # macOS counts bytes, others KiB
    print(json.dumps(dict(seconds=took[1:], peak=peak)))


if __name__ == '__main__': main(sys.argv[1], *map(int, sys.argv[2:]))
