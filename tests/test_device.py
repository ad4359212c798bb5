"""A GPU where there is none: tensors are said to lie on a Mac's, compute on the CPU, and may not be mixed with those of the CPU."""
import pytest
import torch
from conftest import untrained
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from sd_deepdive.drawings import drawings
from sd_deepdive.further.many import draw_many, fingerprint, number_wishes
from sd_deepdive.further.own_pictures import fine_tune, held_out_loss
from sd_deepdive.further.steering import caption_loss, steer
from sd_deepdive.images import fit_picture
from sd_deepdive.img2img import image_to_image
from sd_deepdive.latents import latents2pil, pil2latent
from sd_deepdive.models import load_pipeline, text_to_image
from sd_deepdive.parts import load_parts, take_apart
from sd_deepdive.sampling import denoise, make_noise, make_samples, start_latents
from sd_deepdive.schedulers import SCHEDULERS, with_scheduler
from sd_deepdive.scratch.parts import load_parts as load_by_hand
from sd_deepdive.scratch.samplers import SAMPLERS, with_sampler
from sd_deepdive.text import text_enc
from sd_deepdive.training.adapt import train_word
from sd_deepdive.training.autoencoder import round_trips
from sd_deepdive.training.clip import clip_scores, load_clip
from sd_deepdive.training.diffusion import caption_gap, losses_at, prepare
from sd_deepdive.training.quality import load_judge, on_white, quality
from sd_deepdive.words import add_words, word_vector

OTHER = 'mps'
READ = {getattr(Tensor, name).__get__: name for name in ('device', 'is_cpu', 'is_mps')}
MOVES = 'to', 'cpu', 'type_as'
FREE = {'copy_', '_foreach_copy_', '__setitem__', '_has_compatible_shallow_copy_type'}      # from any device to any


def away(x): return getattr(x, 'away', False)


def named(x):
    "The device that an argument names."
    return x.type if isinstance(x, torch.device) else x.split(':')[0] if isinstance(x, str) and x.split(':')[0] in ('cpu', 'meta', OTHER) else None


def here(x): return 'cpu' if named(x) == OTHER else x


class Elsewhere(TorchFunctionMode):
    "Inside the `with`, the other device is there."
    def __enter__(self):
        self.patch, new = pytest.MonkeyPatch(), nn.Parameter.__new__
        def parameter(cls, data=None, requires_grad=True):
            made = new(cls, data, requires_grad)
            if away(data): made.away = True
            return made
        self.patch.setattr(nn.Parameter, '__new__', parameter)
        self.patch.setattr(torch.backends.mps, 'is_available', lambda: True)
        for name in ('synchronize', 'empty_cache'): self.patch.setattr(torch.mps, name, lambda: None)
        return super().__enter__()

    def __exit__(self, *args):
        super().__exit__(*args)
        self.patch.undo()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(function, '__name__', '')
        if function in READ:
            if not away(args[0]): return function(*args)
            return dict(device=torch.device(OTHER, 0), is_cpu=False, is_mps=True)[READ[function]]
        if function == Tensor.data.__set__:
            if away(args[0]) != away(args[1]): args[0].away = away(args[1])
            return function(*args)
        if name in ('numpy', '__array__') and away(args[0]): raise TypeError("can't convert a tensor of another device to numpy")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = any(map(away, tensors))
        if name in MOVES: return self.move(function, name, args, kwargs)
        if kwargs.get('device') is not None and named(kwargs['device']):
            there = named(kwargs['device']) == OTHER
            if there and isinstance(kwargs.get('generator'), torch.Generator): raise RuntimeError('the generator is on the CPU')
            kwargs['device'] = here(kwargs['device'])
        elif name.endswith('_like') or name.startswith('new_') or name == '__getitem__': there = away(args[0])
        places = {away(x) for x in (tensors[1:] + [torch.ones(1)] if name == '__getitem__' and not away(args[0]) else tensors) if x.ndim}
        if len(places) > 1 and name not in FREE and not (name == '__getitem__' and away(args[0])):
            raise RuntimeError(f'{name}: all tensors should be on one device')
        result = function(*args, **kwargs)
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and not any(x is y for y in tensors) and there != away(x): x.away = there
        return result

    def move(self, function, name, args, kwargs):
        "To a device; a copy if it is another one."
        tensor, there = args[0], away(args[0]) and name != 'cpu'
        for x in (*args[1:], kwargs.get('device'), kwargs.get('other')):
            if isinstance(x, Tensor): there = away(x)
            elif named(x): there = named(x) == OTHER
        moved = function(tensor, *map(here, args[1:]), **{k: here(v) for k, v in kwargs.items()})
        if moved is tensor and there != away(tensor): moved = moved.clone()
        if there != away(moved): moved.away = there
        return moved


@pytest.fixture(scope='module', autouse=True)
def elsewhere():
    with Elsewhere(): yield


@pytest.fixture(scope='module')
def pipe(elsewhere): return load_pipeline()


@pytest.fixture(scope='module')
def parts(pipe): return take_apart(pipe)


def test_control(parts):
    "The pretence holds: a model goes there by itself, and what cannot be done on a GPU cannot be done here."
    x, here = torch.ones(2).to(OTHER), torch.ones(2)
    assert parts.device.type == x.device.type == (x*2).device.type == OTHER and x.cpu().device.type == 'cpu'
    for wrong in (lambda: x + here, lambda: torch.cat([x, here]), lambda: here[x.long()], lambda: parts.vae.decode(torch.zeros(1, 4, 4, 4)),
                  lambda: torch.randn(2, device=OTHER, generator=torch.Generator())):
        with pytest.raises(RuntimeError): wrong()
    with pytest.raises(TypeError): x.numpy()
    line = nn.Linear(2, 1).to(OTHER)
    line(x).sum().backward()
    assert line.weight.grad.device.type == line.weight.device.type == OTHER


def test_pipeline(pipe):
    "The library's way: from text, from a picture."
    start = text_to_image(pipe, 'a bell', num_inference_steps=2)[0]
    assert image_to_image(pipe, 'a bell', start, strength=.5, num_inference_steps=4)[0].size == start.size


@pytest.mark.parametrize('name', SCHEDULERS)
def test_schedulers(parts, name):
    "The loop, from noise and from a picture, with each of the library's schedulers."
    parts = with_scheduler(parts, name)
    picture = fit_picture(drawings('octopus')[0].image, parts.side, parts.side)
    for start in (dict(), dict(init_image=picture, start_step=2)):
        assert make_samples(parts, 'a bell', negative_prompt='red', num_inference_steps=4, **start).device.type == OTHER
    assert latents2pil(parts, pil2latent(parts, picture))[0].size == picture.size


@pytest.mark.parametrize('name', SAMPLERS)
def test_by_hand(parts, name):
    "The networks by hand, with each sampler by hand."
    ours = load_by_hand()
    assert ours.device.type == OTHER
    assert make_samples(with_sampler(ours, name), 'a bell', num_inference_steps=3).device.type == OTHER


def test_steering(parts):
    "The gradient of a loss, through the decoder and a CLIP on the same device."
    parts = with_scheduler(parts, 'DDIM')
    loss = caption_loss(load_clip(parts.text_encoder).requires_grad_(False), parts.tokenizer, ['a bell'])
    run = denoise(parts, start_latents(parts, make_noise(parts, 1), 2), text_enc(parts, 'a bell'), text_enc(parts, ''), num_inference_steps=2)
    for step in run: steer(parts, step, loss, .01)
    assert step.latents.device.type == OTHER


def test_training():
    "Numbers, a word and a fine-tuned model: what is trained is trained where the model is; results for eyes and files come back."
    parts, some = load_parts(dtype=torch.float32), drawings('octopus')[:2]
    ready = prepare(parts, some, white=1, captions=1)
    assert ready.latents.device.type == ready.states.device.type == 'cpu'
    alphas_cumprod = parts.scheduler.alphas_cumprod
    assert all(loss > 0 for loss in losses_at(parts.unet, ready.latents[:, 0], ready.states[:, 0], alphas_cumprod, [100, 500]))
    assert len(caption_gap(parts.unet, ready, alphas_cumprod, [0, 1], n=2)) == 3
    add_words(parts, {'<bell>': word_vector(parts, 'bell')})
    vector, losses = train_word(parts, '<bell>', ready.latents[:, 0], ['<bell>']*2, steps=2, batch=2)
    assert vector.device.type == OTHER and len(losses) == 2
    for rank in (0, 2): assert len(fine_tune(parts, ready.latents[:, 0], ['a zorp', 'two zorps'], steps=2, batch=2, rank=rank)) == 2
    assert held_out_loss(parts, ready.latents[:, 0], ['a zorp', 'two zorps']) > 0


def test_judged(parts):
    "Quality, scores and round trips take pictures from wherever they are."
    some = drawings('octopus')[:2]
    assert [row[0] for row in quality(parts, load_judge(), some, some, num_inference_steps=2)] == ['drawn', 'ceiling', 'floor']
    scores = [clip_scores(load_clip(parts.text_encoder), parts.tokenizer, on_white(some).to(place), ['a', 'b']) for place in ('cpu', OTHER)]
    assert torch.equal(*scores) and round_trips(parts.vae, on_white(some)).device.type == 'cpu'


def test_many(tmp_path):
    "A pipeline's pictures go to files."
    pipe = untrained().to(OTHER)
    assert len(draw_many(pipe, number_wishes('sun'), tmp_path/'x', num_inference_steps=2)) == 1 and fingerprint(take_apart(pipe))
