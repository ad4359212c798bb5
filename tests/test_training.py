"""The code that makes the embedded model: its recipe, a loop that survives a kill, several processes, and the whole recipe in small."""
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, command, launch, run
from safetensors.torch import load_file

from sd_deepdive.drawings import drawings, read_drawings, write_drawings
from sd_deepdive.models import load_pipeline, text_to_image
from sd_deepdive.places import embedded_folder
from sd_deepdive.schedule import add_noise
from sd_deepdive.training.clip import load_clip
from sd_deepdive.training.data import caption, compose, stack, styles, things
from sd_deepdive.training.diffusion import Prepared, diffusion_batches, noise_loss
from sd_deepdive.training.loop import Trainer
from sd_deepdive.training.sources import held_out_pairs

# A small UNet with attention learns noise from latents and states that are random: what matters here is the arithmetic.
SCRIPT = '''
import sys, torch
from pathlib import Path
from diffusers import UNet2DConditionModel
from sd_deepdive.drawings import drawings
from sd_deepdive.training.diffusion import Prepared, diffusion_batches, noise_loss
from sd_deepdive.training.loop import Trainer, accelerator, save_whole
folder, steps, acc = Path(sys.argv[1]), int(sys.argv[2]), accelerator(*sys.argv[3:])
g, some = torch.Generator().manual_seed(0), drawings('red apple')
ready = Prepared(some, torch.randn(len(some), 13, 4, 8, 8, generator=g), torch.randn(len(some), 30, 77, 16, generator=g), torch.randn(77, 16, generator=g))
torch.manual_seed(0)
unet = UNet2DConditionModel(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16, attention_head_dim=4, norm_num_groups=4,
                            down_block_types=['CrossAttnDownBlock2D', 'DownBlock2D'], up_block_types=['UpBlock2D', 'CrossAttnUpBlock2D'])
trainer = Trainer(unet, steps, 1e-3, folder, acc, warmup=5)
losses = trainer.fit(diffusion_batches(ready, [(1, steps)], batch=8), noise_loss(torch.linspace(.999, .005, 1000)), every=5)
if trainer.acc.is_main_process: save_whole(folder/'end.pt', dict(weights=unet.state_dict(), losses=torch.tensor(losses), processes=trainer.acc.num_processes))
'''


@pytest.fixture(scope='module')
def script(tmp_path_factory):
    file = tmp_path_factory.mktemp('script')/'train.py'
    file.write_text(SCRIPT)
    return file


def end(folder): return torch.load(folder/'end.pt', weights_only=True)


@pytest.fixture(scope='module')
def unbroken(script, tmp_path_factory):
    "The end of a run of one process that nothing disturbed."
    folder = tmp_path_factory.mktemp('unbroken')
    run(sys.executable, script, folder, '40', cwd=ROOT)
    return end(folder)


def test_two_processes(script, unbroken, tmp_path):
    "Two processes started by `accelerate launch` have the losses and the weights of one with the same batch."
    run(*launch(2), script, tmp_path, '40', cwd=ROOT)
    two = end(tmp_path)
    assert (unbroken['processes'], two['processes']) == (1, 2)
    assert (two['losses'] - unbroken['losses']).abs().max() < 1e-4
    assert max((two['weights'][k] - w).abs().max() for k, w in unbroken['weights'].items()) < 1e-3
    assert (unbroken['losses'] - unbroken['losses'].roll(1)).abs().max() > 1e-2, 'the losses of two steps differ by more'


def test_half_precision(script, unbroken, tmp_path):
    "In bf16 the losses are nearly those of single precision, and the weights stay single."
    run(sys.executable, script, tmp_path, '40', 'bf16', cwd=ROOT)
    half = end(tmp_path)
    assert 0 < (half['losses'] - unbroken['losses']).abs().max() < .05
    assert {w.dtype for w in half['weights'].values()} == {torch.float32}


def test_killed(script, unbroken, tmp_path):
    "Killed with -9 at any moment, three times, training goes on and ends with the weights of an unbroken run, bit for bit."
    rng, kills = random.Random(0), 0
    while not (tmp_path/'end.pt').exists():
        was = (tmp_path/'checkpoint.pt').stat().st_mtime_ns if (tmp_path/'checkpoint.pt').exists() else 0
        process = command(script, tmp_path, 40, cwd=ROOT, out=tmp_path/'said')
        process.start()
        while kills < 3 and process.is_alive():     # wait for a newer checkpoint, then for a moment
            if (tmp_path/'checkpoint.pt').exists() and (tmp_path/'checkpoint.pt').stat().st_mtime_ns > was:
                time.sleep(rng.random()*.1)
                process.kill()
                kills += 1
                break
            time.sleep(.005)
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), (tmp_path/'said').read_text()[-3000:]
    killed = end(tmp_path)
    assert kills == 3 and torch.equal(killed['losses'], unbroken['losses'])
    assert all(torch.equal(killed['weights'][k], w) for k, w in unbroken['weights'].items())


def test_noise_loss():
    "The loss is its equation, bit for bit, also when the schedule has been carried to the device before."
    g, alphas_cumprod, t = torch.Generator().manual_seed(0), torch.linspace(.999, .005, 1000), torch.tensor([0, 500, 999])
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=g)
    x_t = add_noise(latents, noise, alphas_cumprod[t])
    loss, half = noise_loss(alphas_cumprod), lambda x, t, text: SimpleNamespace(sample=x/2)
    for _ in range(2): assert torch.equal(loss(half, latents, None, t, noise), (x_t/2 - noise).square().mean((1, 2, 3)).mean())


def test_rehearse():
    "In a later stage the things of the first are drawn as often as is asked for; without it, as often as the others."
    some = [d for d in drawings() if d.thing in things(3) and not d.held_out]
    which = torch.arange(len(some)).view(-1, 1, 1, 1, 1).expand(-1, 13, 1, 1, 1)
    ready = Prepared(some, which, torch.zeros(len(some), 30, 2, 1), torch.zeros(2, 1))
    def share(**kw):
        shown = diffusion_batches(ready, [(1, 10), (3, 20)], batch=2000, **kw)(torch.Generator().manual_seed(0), 15)['latents']
        return sum(some[int(i)].thing == things(1)[0] for i in shown.flatten())/2000
    fair = sum(d.thing == things(1)[0] for d in some)/len(some)
    assert abs(share() - fair) < .04 and abs(share(rehearse=.5) - (.5 + fair/2)) < .04


def test_checkpoint_that_is_none(tmp_path):
    "A file that was cut short, or is something else, is named."
    (tmp_path/'checkpoint.pt').write_bytes(b'PK\x03\x04 not a checkpoint')
    with pytest.raises(ValueError, match='checkpoint.pt'):
        Trainer(torch.nn.Linear(3, 1), 5, .1, tmp_path).fit(lambda g, step: dict(x=torch.randn(4, 3, generator=g)), lambda m, x: m(x).square().mean())


def test_lower_rate(tmp_path):
    "Training that goes on goes on at the rate that is asked for now, where in its course it is."
    draw, loss = lambda g, step: dict(x=torch.randn(4, 3, generator=g)), lambda m, x: m(x).square().mean()
    def trainer(lr): return Trainer(torch.nn.Linear(3, 1), 20, lr, tmp_path, warmup=2)
    half = trainer(.1)
    half.steps = 16
    half.fit(draw, loss, every=1)
    rates = []
    for lr in (.1, .01):
        again = trainer(lr)
        again.load()
        rates.append(again.optimizer.param_groups[0]['lr'])
        again.optimizer.step(), again.schedule.step()
        rates.append(again.schedule.get_last_lr()[0])
    assert rates[0] == half.schedule.get_last_lr()[0] and .01 < rates[1] < rates[0] < .1
    assert torch.allclose(torch.tensor(rates[:2])/10, torch.tensor(rates[2:]))


def test_gradient_that_is_none(tmp_path):
    "A gradient that is not finite, of a loss that is, ends training before it spoils the weights."
    line = torch.nn.Linear(3, 1)
    with pytest.raises(FloatingPointError, match='length of its gradient (nan|inf).*lower lr'):
        Trainer(line, 5, .1, tmp_path).fit(lambda g, step: dict(x=torch.zeros(4, 3)), lambda m, x: (m(x)*0).sum().abs().sqrt())
    assert all(w.isfinite().all() for w in line.parameters()) and not (tmp_path/'checkpoint.pt').exists()


# The recipe --------------------------------------------------------------------------------------------------------

def test_slice():
    "The slice in the package holds two dozen things in every style that has them; pictures of the right size, premultiplied."
    rgba = stack(drawings())
    assert rgba.shape == (len(drawings()), 4, 128, 128) and rgba.dtype == torch.uint8
    assert {d.thing for d in drawings()} == set(things(24))
    for style in {d.style for d in drawings()} & set(styles()): assert len(drawings(style=style)) == 24
    assert (rgba[:, :3] <= rgba[:, 3:]).all(), 'colour is premultiplied by alpha'
    assert (rgba[:, 3].flatten(1).amax(1) > 200).all(), 'no picture is empty'


def test_held_out():
    "At least 100 pairs of things that are drawn, some in each style; no thing is held out in every style."
    drawn = [p for p in held_out_pairs() if p[0] in things()]
    assert len(drawn) >= 100 and {s for _, s in drawn} == set(styles())
    for thing in things(): assert sum((thing, s) in held_out_pairs() for s in styles()) < len(styles()) - 1
    assert {(d.thing, d.style) for d in drawings(held_out=True) if d.style in styles()} == {p for p in drawn if drawings_of_slice(*p)}


def drawings_of_slice(thing, style): return [d for d in drawings() if (d.thing, d.style) == (thing, style)]


def test_captions():
    "A caption names the thing, or now and then the style alone; the background exactly when it is not white, or else seldom."
    octopus = drawings('octopus', '3d')[0]
    white, blue = ([caption(octopus, name, random.Random(i)) for i in range(300)] for name in ('white', 'blue'))
    alone = [c for c in white + blue if 'octopus' not in c]
    assert 0 < len(alone) < 80 and all(c.split(',')[0] == 'a 3d emoji' for c in alone)
    assert all(c.endswith('on a blue background') for c in blue)
    assert 0 < sum('background' in c for c in white) < 100
    assert {'an octopus', 'octopus, 3d style', 'a 3d emoji of an octopus'} <= set(white)


def test_compose():
    "Without a matrix a picture is laid on its colour, pixel for pixel."
    rgba = torch.zeros(1, 4, 8, 8, dtype=torch.uint8)
    rgba[:, 0, :4], rgba[:, 3, :4] = 255, 255
    pixels = compose(rgba, torch.tensor([[0., 0., 1.]]))
    assert torch.equal(pixels[0, :, 0, 0], torch.tensor([1., -1., -1.])) and torch.equal(pixels[0, :, 7, 7], torch.tensor([-1., -1., 1.]))


@pytest.mark.parametrize('n', [0, 100_000])
def test_number_of_things(n):
    with pytest.raises(ValueError, match=f'n={n}'): things(n)


# The whole of it, in small -------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "Every command of the recipe, a few steps each, on three things: the folder that they work in, and the package that is put together."
    from tools.training import assemble, card
    root = tmp_path_factory.mktemp('recipe')
    work, package = root/'artifacts', root/'package'
    write_drawings([d for d in drawings() if d.thing in things(3)], work/'pictures.zip')

    def does(module, *options):
        process = command(f'sd_deepdive.training.{module}', '--folder', work, *options, cwd=root, out=root/'said')
        process.start(), process.join()
        said = (root/'said').read_text()
        assert process.exitcode == 0, said[-3000:]
        return said
    said = [does('autoencoder', '--crop-steps', 2, '--steps', 1), does('clip', '--steps', 2, '--batch', 8), does('clip', '--judge', '--steps', 1, '--batch', 8),
            does('diffusion', '--stages', '2:2 3:4', '--batch', 4, '--every', 4)]
    pairs = (embedded_folder()/'tokenizer'/'merges.txt').read_text().splitlines()[1:]
    new = work/'embedded.new'
    assemble.save_pipeline(work, new, pairs)
    (new/'README.md').write_text(card.card(work))
    package.mkdir()
    assemble.replace(new, package/'embedded')
    assemble.save_data(work, package/'data')
    said.append(does('quality', '--model', package/'embedded', '--captions', 2))
    return work, package, said


def test_commands(trained):
    "Each step reports what it should, and leaves what the next one needs."
    work, _, (autoencoder, text, judge, diffusion, quality) = trained
    assert 'PSNR of' in autoencoder and 'held out' in text and '3 things, caption gap' in diffusion and 'held-out pairs' in quality
    for name in ('autoencoder/round_trips.png', 'text/record.json', 'judge/picture_tower.safetensors', 'diffusion/sheet-000004.png', 'quality.json'):
        assert (work/name).stat().st_size > 50, name
    assert not list(work.rglob('*.part'))


def test_assembled(trained):
    "The folder loads as a model and draws; tokenizer files are those of the shipped one; the card names things, licences and records."
    _, package, _ = trained
    assert text_to_image(load_pipeline(package/'embedded', device='cpu'), 'a rocket', num_inference_steps=2)[0].size == (128, 128)
    for name in ('vocab.json', 'merges.txt'):
        assert (package/'embedded'/'tokenizer'/name).read_bytes() == (embedded_folder()/'tokenizer'/name).read_bytes()
    card = (package/'embedded'/'README.md').read_text()
    for words in (*things(3), 'CC-BY-4.0', 'Apache-2.0', '"crop_steps": 2', '$'):
        assert (words in card) == (words != '$'), words
    assert len(read_drawings(package/'data'/'pictures.zip')) == sum(d.thing in things(3) for d in drawings())
    for tower in ('picture_tower', 'judge'):
        assert load_clip(tower=package/'data'/f'{tower}.safetensors').picture(torch.zeros(1, 3, 64, 64)).isfinite().all()


def test_on_the_way(trained, tmp_path):
    "Weights that were kept on their way come back, in half precision, all of them."
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    from tools.training import on_the_way
    on_the_way.keep(trained[0], tmp_path/'kept')
    on_the_way.restore(tmp_path/'back', tmp_path/'kept')
    for kind, place in ((UNet2DConditionModel, 'diffusion/on-the-way'), (CLIPTextModel, 'text/text_encoder')):
        was, now = (kind.from_pretrained(folder/place).state_dict() for folder in (trained[0], tmp_path/'back'))
        assert was.keys() == now.keys() and all(torch.equal(now[name], w.half().float()) for name, w in was.items())
    for name in on_the_way.TOWERS:
        was, now = (load_file(folder/name/'picture_tower.safetensors') for folder in (trained[0], tmp_path/'back'))
        assert was.keys() == now.keys() and all(torch.equal(now[key], w.half()) for key, w in was.items())
    assert (tmp_path/'back'/'text'/'record.json').read_text() == (trained[0]/'text'/'record.json').read_text()
    with pytest.raises(FileNotFoundError, match='make keep'): on_the_way.restore(tmp_path, tmp_path/'nothing')


def test_no_data(tmp_path):
    "Without the set, a command says how to get it."
    done = subprocess.run([sys.executable, '-m', 'sd_deepdive.training.diffusion', '--folder', tmp_path], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode and 'make data' in done.stderr.splitlines()[-1]


def test_text_needs_one_process(tmp_path):
    "The contrastive loss compares each text with the whole batch."
    done = subprocess.run([*launch(2), '-m', 'sd_deepdive.training.clip', '--folder', tmp_path], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode and 'Start one process' in done.stderr
