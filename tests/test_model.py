"""The embedded model, and the loading of models by name."""
import json
import shutil
import warnings

import pytest
import torch
from conftest import untrained
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPImageProcessor

from sd_deepdive.drawings import drawings
from sd_deepdive.images import max_difference
from sd_deepdive.img2img import image_to_image
from sd_deepdive.models import load_pipeline, text_to_image
from sd_deepdive.places import embedded_folder, find_model
from sd_deepdive.parts import load_parts
from sd_deepdive.sampling import make_samples
from sd_deepdive.scratch.parts import load_parts as load_by_hand
from sd_deepdive.schedulers import SCHEDULERS, with_scheduler
from sd_deepdive.text import unknown_words
from sd_deepdive.training.autoencoder import latent_deviation, psnr_of, round_trips
from sd_deepdive.training.diffusion import noise_loss, text_states
from sd_deepdive.training.quality import on_white


@pytest.fixture(scope='module')
def pipe(): return load_pipeline(device='cpu')


@pytest.fixture
def small(tmp_path):
    "A folder like a downloaded checkpoint, very small and untrained, with a safety checker that finds everything indecent."
    words = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=words, projection_dim=16, vision_config=words | dict(image_size=16, patch_size=8)))
    checker.concept_embeds_weights.data.fill_(-2.)
    extractor = CLIPImageProcessor(size={'shortest_edge': 16}, crop_size=16)
    untrained(safety_checker=checker, feature_extractor=extractor).save_pretrained(tmp_path/'small')
    return tmp_path/'small'


def test_shape(pipe):
    "Stable Diffusion 1.x in small: the block types, the numbers that the course is built on, the tokenizer."
    unet, vae, text, steps = pipe.unet.config, pipe.vae.config, pipe.text_encoder.config, pipe.scheduler.config
    assert (unet.in_channels, unet.sample_size, unet.cross_attention_dim) == (4, 16, text.hidden_size)
    assert list(unet.down_block_types) == ['CrossAttnDownBlock2D']*3 + ['DownBlock2D']
    assert (vae.latent_channels, vae.sample_size, pipe.vae_scale_factor) == (4, 128, 8)
    assert (len(pipe.tokenizer), pipe.tokenizer.model_max_length, text.max_position_embeddings) == (49408, 77, 77)
    assert (steps.beta_schedule, steps.beta_start, steps.beta_end, steps.num_train_timesteps) == ('scaled_linear', .00085, .012, 1000)
    assert steps.get('prediction_type', 'epsilon') == 'epsilon' and type(pipe.scheduler).__name__ == 'PNDMScheduler'


def test_size():
    "The folder is at most 36 MB, its weights in half precision."
    assert sum(f.stat().st_size for f in embedded_folder().rglob('*')) <= 36e6
    files = [*embedded_folder().glob('*/*.safetensors')]
    assert len(files) == 3 and {w.dtype for f in files for w in load_file(f).values() if w.is_floating_point()} == {torch.float16}


def test_plain_diffusers_makes_the_same_pictures(pipe):
    "Loaded with nothing of ours, the folder draws the same picture to the bit."
    plain = StableDiffusionPipeline.from_pretrained(embedded_folder())
    theirs = plain('tulip, 3d style', num_inference_steps=8, guidance_scale=3., generator=torch.Generator().manual_seed(3)).images[0]
    assert theirs.tobytes() == text_to_image(pipe, 'tulip, 3d style', seeds=3, num_inference_steps=8)[0].tobytes()


def test_autoencoder_on_held_out_pictures(pipe):
    "Pictures that it was not trained on come back with at least 24 dB."
    pixels = on_white(drawings(held_out=True))
    assert len(pixels) >= 5 and psnr_of(round_trips(pipe.vae, pixels), pixels).mean() >= 24


def test_scaling_factor(pipe):
    "Scaled latents deviate by about one, as the noise does."
    assert abs(latent_deviation(pipe.vae, on_white(drawings()))*pipe.vae.config.scaling_factor - 1) < .1


@torch.no_grad()
def test_captions_matter(pipe):
    "The right caption lowers the loss by a quarter and more against a wrong one."
    use = drawings(held_out=False)[::3]
    z = pipe.vae.encode(on_white(use)).latent_dist.mode()*pipe.vae.config.scaling_factor
    text, noise = text_states(pipe, [d.caption for d in use]).float(), torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    loss, t = noise_loss(pipe.scheduler.alphas_cumprod), torch.full((len(use),), 700)
    right, wrong = (loss(pipe.unet, z, words, t, noise) for words in (text, text.roll(len(use)//2, 0)))
    assert right < .75*wrong


def test_batch_does_not_matter(pipe):
    "A picture depends on its prompt and its seed, not on what is made beside it."
    prompts = ['a banana', 'key, flat style', 'ghost, 3d style']
    together = text_to_image(pipe, prompts, seeds=[4, 5, 6], num_inference_steps=6)
    alone = [text_to_image(pipe, p, seeds=s, num_inference_steps=6, batch_size=1)[0] for p, s in zip(prompts, [4, 5, 6])]
    assert max(map(max_difference, together, alone)) <= 1
    assert max_difference(together[0], together[1]) > 50


@pytest.mark.parametrize('wrong, words', [
    (dict(num_inference_steps=0), 'num_inference_steps=0'), (dict(num_inference_steps=1001), 'from 1 to 1000'),
    (dict(guidance_scale='3'), "guidance_scale='3'"), (dict(guidance_scale=float('nan')), 'guidance_scale=nan'),
    (dict(num_inference_steps='10'), "num_inference_steps='10'"), (dict(num_inference_steps=2.5), 'num_inference_steps=2.5'),
    (dict(width=100), 'width=100.*multiple of 8.*width=96'), (dict(height=-8), 'height=-8'), (dict(prompt=b'abc'), 'prompt=b'), (dict(seeds=True), 'seeds=True'), (dict(height='8'), "height='8'"),
    (dict(prompt=[]), 'at least one'), (dict(prompt=None), 'prompt=None'), (dict(prompt=['a', 3]), 'prompt=3'),
    (dict(prompt=['a', 'b'], seeds=[1, 2, 3]), 'do not pair up'), (dict(seeds='abc'), "seeds='abc'"), (dict(seeds=1.5), 'seeds=1.5'),
    (dict(seeds=-1), 'seeds=-1'), (dict(batch_size=0), 'batch_size=0'), (dict(negative_prompt=['red', 3]), 'negative_prompt=3'), (dict(negative_prompt=['a', 'b'], seeds=[1, 2, 3]), 'do not pair up')])
def test_wrong_requests(pipe, wrong, words):
    "A wrong argument is named, with its value, before anything is computed."
    with pytest.raises((ValueError, TypeError), match=words): text_to_image(pipe, **{'prompt': 'a bell', **wrong})


@pytest.mark.parametrize('device', ['tpu', 'gpu', 3.5] + ['cuda']*(not torch.cuda.is_available()))
def test_wrong_device(device):
    with pytest.raises(ValueError, match=f'device=.?{device}'): load_pipeline(device=device)


@pytest.mark.parametrize('name', ['embeded', 'no/such/folder/here', '', 'CompVis/', './nothing'])
def test_unknown_name(name):
    with pytest.raises(ValueError, match='embedded'): load_pipeline(name)


def test_hub_unreachable(offline):
    "With no network a hub id ends in one clear line, which says that the embedded model needs none."
    with pytest.raises(ConnectionError, match='someone/nothing.*network.*embedded'): load_pipeline('someone/nothing', device='cpu')


@pytest.mark.parametrize('dtype', ['float16', 16, torch.int32])
def test_wrong_dtype(dtype):
    with pytest.raises(TypeError, match='dtype='): load_pipeline(device='cpu', dtype=dtype)


@pytest.mark.parametrize('name', [None, 5])
def test_name_of_wrong_type(name):
    with pytest.raises(TypeError, match=f'name={name}'): load_pipeline(name)


@pytest.mark.parametrize('wrong', [None, 'embedded'])
def test_no_pipeline(wrong):
    with pytest.raises(TypeError, match='pipe is .*load_pipeline'): text_to_image(wrong, 'a bell')


@pytest.mark.parametrize('sides, size', [(dict(height=64), (128, 64)), (dict(width=192), (192, 128)), (dict(height=64, width=72), (72, 64))])
def test_sides(pipe, sides, size):
    "A side that is not given is the model's own."
    assert text_to_image(pipe, 'a bell', num_inference_steps=2, **sides)[0].size == size


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(other, dtype):
    "The loop runs in half precision with every scheduler, and from a picture."
    parts, image = load_parts(other, 'cpu', dtype), drawings('banana')[0].image.resize((64, 64))
    for name in SCHEDULERS:
        for start in (dict(), dict(init_image=image, start_step=2)):
            pixels = make_samples(with_scheduler(parts, name), 'a bell', num_inference_steps=4, **start)
            assert pixels.dtype == dtype and pixels.isfinite().all(), name


def test_negative_prompt(pipe):
    "An empty negative prompt is the same as none; another one changes the picture."
    none, empty, red = (text_to_image(pipe, 'a bell', num_inference_steps=4, negative_prompt=n)[0] for n in (None, '', 'red heart'))
    assert max_difference(none, empty) == 0 < max_difference(none, red)


@pytest.mark.parametrize('file', ['model_index.json', 'unet/config.json', 'tokenizer/vocab.json', 'tokenizer/merges.txt'])
def test_cut_short(tmp_path, file):
    "Whatever file of a folder is cut short, the folder is named and the remedy given."
    shutil.copytree(embedded_folder(), tmp_path/'copy')
    whole = (tmp_path/'copy'/file).read_bytes()
    (tmp_path/'copy'/file).write_bytes(whole[:len(whole)//2])
    with pytest.raises(ValueError, match='copy.*Copy the folder again'): load_pipeline(tmp_path/'copy', device='cpu')


@pytest.mark.parametrize('part', [0, .3, .999])
def test_merges_cut_short(tmp_path, part):
    "Merges that end early, at the end of a line, would give words other ids without a word: refused by both loaders, and by the finder."
    shutil.copytree(embedded_folder(), tmp_path/'copy')
    file = tmp_path/'copy'/'tokenizer'/'merges.txt'
    lines = file.read_text().splitlines(keepends=True)
    file.write_text(''.join(lines[:round(part*len(lines))]))
    for load in (find_model, load_pipeline, load_parts, load_by_hand):
        with pytest.raises(ValueError, match='merges.*Copy the folder again'): load(tmp_path/'copy')
    file.unlink()
    with pytest.raises(ValueError, match='no tokenizer/merges.txt.*Copy the folder again'): load_pipeline(tmp_path/'copy')


@pytest.mark.parametrize('g', [-.1, -5])
def test_negative_guidance(pipe, g):
    "diffusers would take it for 1."
    with pytest.raises(ValueError, match=f'guidance_scale={g}'): text_to_image(pipe, 'a bell', guidance_scale=g)


def test_long_prompt(pipe):
    "The warning of a prompt of thousands of words does not show them all."
    with pytest.warns(UserWarning, match='cut off is') as said: text_to_image(pipe, 'a bell '*3000, num_inference_steps=2)
    assert all(len(str(w.message)) < 600 for w in said)


def test_unknown_words(pipe):
    "Whoever draws is told of words that the model never learned, at the line that asks; by no warning otherwise."
    lines, red = [], Image.new('RGB', (128, 128), 'red')
    for draw in (lambda: text_to_image(pipe, 'a lighthouse', num_inference_steps=2), lambda: image_to_image(pipe, 'a bell', red, negative_prompt='Blurry!', num_inference_steps=4)):
        with pytest.warns(UserWarning, match=r'never learned these words: (lighthouse|Blurry)\.') as said: draw()
        assert len(said) == 1
        lines.append(said[0].filename)
    assert {*lines} == {__file__}
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        text_to_image(pipe, 'a red apple, 3d style, on a blue background!', num_inference_steps=2)
    assert unknown_words(load_by_hand(device='cpu'), 'Two submarines') == unknown_words(pipe, 'Two submarines') == ['submarines']


def test_another_kind_of_pipeline(small):
    "A pipeline of another class is refused."
    index = json.loads((small/'model_index.json').read_text())
    (small/'model_index.json').write_text(json.dumps(index | {'_class_name': 'StableDiffusionXLPipeline'}))
    with pytest.raises(ValueError, match='does not describe'): load_pipeline(small)


def test_folder_without_pipeline(tmp_path):
    with pytest.raises(ValueError, match='model_index.json'): load_pipeline(tmp_path)


def test_truncated_weights(small):
    "A file that was cut short is named."
    file = small/'unet'/'diffusion_pytorch_model.safetensors'
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match='unet.*cut short'): load_pipeline(small)


def test_missing_part(small):
    "A folder from which a part is gone is no model that can be loaded: the part is named."
    shutil.rmtree(small/'unet')
    with pytest.raises(ValueError, match='unet'): load_pipeline(small)


def test_folder_and_safety_checker(small):
    "A folder loads by its path; its safety checker stays, unless it is refused."
    black = text_to_image(load_pipeline(small, device='cpu'), 'a bell', num_inference_steps=2)[0]
    open_ = load_pipeline(small, device='cpu', safety_checker=False)
    assert open_.safety_checker is None
    assert max(black.convert('L').tobytes()) == 0 < max(text_to_image(open_, 'a bell', num_inference_steps=2)[0].convert('L').tobytes())


def test_card():
    "The model card names every package that pictures came from, every held-out thing, and holds measured quality."
    card = (embedded_folder()/'README.md').read_text()
    assert '$' not in card and 'not measured' not in card
    for d in drawings(held_out=True): assert d.thing in card
    for package in ('noto', 'twemoji', 'fluent-emoji-flat', 'fluent-emoji-3d', 'noto-v1', 'fxemoji', 'emojibase-data', 'open_clip_torch'): assert package in card
