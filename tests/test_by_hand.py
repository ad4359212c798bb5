"""Prompt to picture with the parts written by hand: no library, any model's widths, plain errors, few lines."""
import ast, io, json, re, shutil, socket, tokenize

import pytest
import torch
from conftest import CFG, python

from sd_deepdive.hub import choose_files
from sd_deepdive.places import embedded_folder
from sd_deepdive.scratch import parts as by_hand
from sd_deepdive.scratch.samplers import SAMPLERS

FILES = sorted((CFG.lib_path/'scratch').glob('*.py'))
PIECES = ['tokenizer', 'text_encoder', 'autoencoder', 'unet', 'samplers']


def test_no_library_no_network(tmp_path):
    "A fresh interpreter that forbids both libraries and any connection draws the library's picture."
    code = '''
import socket, sys
class Refuse:
    def find_spec(self, name, *args):
        if name.partition('.')[0] in ('diffusers', 'transformers'): raise ImportError(f'{name} is forbidden')
sys.meta_path.insert(0, Refuse())
def no_network(*args, **kw): raise OSError('the network was used')
socket.socket.connect = socket.getaddrinfo = no_network
from sd_deepdive.scratch.parts import load_parts
from sd_deepdive.sampling import make_samples
from sd_deepdive.latents import make_img
make_img(make_samples(load_parts(device='cpu'), 'octopus, 3d style', seeds=3, num_inference_steps=5)[0]).save(sys.argv[1])
print(*{'diffusers', 'transformers'} & set(sys.modules))
'''
    assert python(code, tmp_path/'drawn.png') == ''
    from PIL import Image

    from sd_deepdive.images import max_difference
    from sd_deepdive.models import load_pipeline, text_to_image
    theirs = text_to_image(load_pipeline(device='cpu'), 'octopus, 3d style', seeds=3, num_inference_steps=5)[0]
    assert max_difference(Image.open(tmp_path/'drawn.png'), theirs) <= 1


def largest(a, b, **call):
    "The largest difference of the pixels that two models draw."
    from sd_deepdive.sampling import make_samples
    call = dict(prompt=['octopus, 3d style', 'a café'], seeds=[3, 4], num_inference_steps=5) | call
    return (make_samples(a, **call) - make_samples(b, **call)).abs().max().item()


def test_another_model_equals_the_library(other):
    "Its folder through `load_parts` draws what the library draws from it; with one weight moved it does not."
    from sd_deepdive.parts import load_parts
    ours, library = by_hand.load_parts(other, 'cpu'), load_parts(other, 'cpu')
    assert ours.scaling_factor == .3 and ours.side == library.side == 64
    assert largest(ours, library) < 1e-4
    assert largest(ours, library, negative_prompt='red', guidance_scale=5., width=96) < 1e-4
    ours.unet.conv_out.bias[0] += .5
    assert largest(ours, library) > 1e-3


def test_memory_format_and_precision(other):
    "Both are arguments: channels last gives the same picture, half the digits halve the memory of the weights."
    plain = by_hand.load_parts(other, 'cpu')
    last = by_hand.load_parts(other, 'cpu', memory_format=torch.channels_last)
    assert last.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert largest(plain, last) < 1e-4
    half = by_hand.load_parts(other, 'cpu', torch.float16)
    assert {p.dtype for part in (half.text_encoder, half.unet, half.vae) for p in part.parameters()} == {torch.float16}


def test_folder_as_fetched(other, tmp_path):
    "What is fetched from the hub is enough, though model_index.json names a safety checker that is not there."
    names = [f.relative_to(other).as_posix() for f in other.rglob('*') if f.is_file()]
    more = ['safety_checker/model.safetensors', 'unet/diffusion_pytorch_model.fp16.safetensors', 'text_encoder/pytorch_model.bin']
    for name in choose_files(names + more):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        shutil.copy(other/name, tmp_path/name)
    listing = json.loads((other/'model_index.json').read_text())
    listing |= dict(safety_checker=['stable_diffusion', 'StableDiffusionSafetyChecker'], feature_extractor=['transformers', 'CLIPImageProcessor'])
    (tmp_path/'model_index.json').write_text(json.dumps(listing))
    assert largest(by_hand.load_parts(tmp_path, 'cpu'), by_hand.load_parts(other, 'cpu')) == 0


BREAKS = [('model_index.json', dict(_class_name='StableDiffusionXLPipeline'), 'StableDiffusionXLPipeline.*does not describe'),
          ('unet/config.json', dict(addition_embed_type='text_time'), "addition_embed_type='text_time' is not written"),
          ('unet/config.json', dict(cross_attention_dim=16), 'to_k.weight has shape .* cross_attention_dim=16'),
          ('scheduler/scheduler_config.json', dict(_class_name='UniPCMultistepScheduler'), 'UniPCMultistepScheduler.*model_index.json .PNDMScheduler'),
          ('scheduler/scheduler_config.json', dict(prediction_type='v_prediction'), "prediction_type='v_prediction' is not written"),
          ('scheduler/scheduler_config.json', '{"_class_name": "PND', 'scheduler_config.json.*cut short or damaged'),
          ('scheduler/scheduler_config.json', '[]', 'scheduler_config.json holds a list'),
          ('model_index.json', '{"_cl', 'model_index.json.*cut short or damaged'),
          ('unet/config.json', '{', 'config.json.*cut short or damaged'),
          ('vae/diffusion_pytorch_model.safetensors', 'x', 'cut short or damaged'),
          ('tokenizer/tokenizer.json', '{"model": ', 'tokenizer.json.*cut short or damaged')]


@pytest.mark.parametrize('name, change, message', BREAKS, ids=lambda v: v if isinstance(v, str) and '/' in v else '')
def test_broken_folder(other, tmp_path, name, change, message):
    "Whatever is broken is named, in one line."
    shutil.copytree(other, tmp_path, dirs_exist_ok=True)
    file = tmp_path/name
    file.write_text(json.dumps(json.loads(file.read_text()) | change) if isinstance(change, dict) else change)
    with pytest.raises(ValueError, match=message) as e: by_hand.load_parts(tmp_path)
    assert '\n' not in str(e.value)


def test_another_scheduler(tmp_path):
    "One that is not written here is named, with those that are."
    (tmp_path/'scheduler_config.json').write_text('{"_class_name": "UniPCMultistepScheduler"}')
    with pytest.raises(ValueError, match='UniPCMultistepScheduler.*not written.*PNDMScheduler'): by_hand.load_sampler(tmp_path)


@pytest.mark.parametrize('part', ['tokenizer', 'text_encoder', 'unet', 'vae', 'scheduler'])
def test_missing_part(other, tmp_path, part):
    "A part that is not there is named."
    shutil.copytree(other, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns(part))
    with pytest.raises(ValueError, match=f'lacks {part}'): by_hand.load_parts(tmp_path)


def test_no_model():
    "Names that stand for nothing are refused, and a wrong type by its name."
    for name in ('no/such/folder', 'nosuchmodel', ''):
        with pytest.raises(ValueError, match='is not a model'): by_hand.load_parts(name)
    with pytest.raises(TypeError, match='name=3'): by_hand.load_parts(3)


def test_hub_out_of_reach(tmp_path):
    "No network, a dead proxy, a proxy that never answers: one line, soon."
    code = '''
import sys, time
from sd_deepdive import hub
from sd_deepdive.scratch.parts import load_parts
hub.PATIENCE, began = 1, time.perf_counter()
try: load_parts('nobody/has-this-model')
except ConnectionError as e: print(time.perf_counter() - began, e)
'''
    with socket.create_server(('127.0.0.1', 0)) as silent:      # it takes calls, and says nothing
        ways = dict(offline=dict(HF_HUB_OFFLINE='1'), dead=dict(HTTPS_PROXY='http://127.0.0.1:9'),
                    silent=dict(HTTPS_PROXY=f'http://127.0.0.1:{silent.getsockname()[1]}'))
        for way, env in ways.items():
            seconds, text = python(code, HF_HOME=str(tmp_path), **dict(HF_HUB_OFFLINE='0') | env).split(' ', 1)
            assert float(seconds) < 20 and len(text.splitlines()) == 1, (way, seconds, text)
            words = 'HF_HUB_OFFLINE is set' if way == 'offline' else 'Check the name and the network'
            assert re.match(f"name='nobody/has-this-model' could not be fetched .*{words}", text)


def test_published_configs():
    "The configs that Stable Diffusion 1.4 was published with make networks of the published sizes."
    from sd_deepdive.scratch.autoencoder import Autoencoder
    from sd_deepdive.scratch.text_encoder import TextEncoder
    from sd_deepdive.scratch.unet import UNet
    unet = {'_class_name': 'UNet2DConditionModel', '_diffusers_version': '0.2.2', 'act_fn': 'silu', 'attention_head_dim': 8,
            'block_out_channels': [320, 640, 1280, 1280], 'center_input_sample': False, 'cross_attention_dim': 768,
            'down_block_types': ['CrossAttnDownBlock2D']*3 + ['DownBlock2D'], 'downsample_padding': 1, 'flip_sin_to_cos': True, 'freq_shift': 0,
            'in_channels': 4, 'layers_per_block': 2, 'mid_block_scale_factor': 1, 'norm_eps': 1e-05, 'norm_num_groups': 32, 'out_channels': 4,
            'sample_size': 64, 'up_block_types': ['UpBlock2D'] + ['CrossAttnUpBlock2D']*3}
    vae = {'_class_name': 'AutoencoderKL', '_diffusers_version': '0.2.2', 'act_fn': 'silu', 'block_out_channels': [128, 256, 512, 512],
           'down_block_types': ['DownEncoderBlock2D']*4, 'in_channels': 3, 'latent_channels': 4, 'layers_per_block': 2, 'out_channels': 3,
           'sample_size': 512, 'up_block_types': ['UpDecoderBlock2D']*4}
    text = {'_name_or_path': 'openai/clip-vit-large-patch14', 'architectures': ['CLIPTextModel'], 'attention_dropout': 0.0, 'bos_token_id': 0,
            'dropout': 0.0, 'eos_token_id': 2, 'hidden_act': 'quick_gelu', 'hidden_size': 768, 'initializer_factor': 1.0,
            'initializer_range': 0.02, 'intermediate_size': 3072, 'layer_norm_eps': 1e-05, 'max_position_embeddings': 77,
            'model_type': 'clip_text_model', 'num_attention_heads': 12, 'num_hidden_layers': 12, 'pad_token_id': 1, 'torch_dtype': 'float32',
            'transformers_version': '4.21.0.dev0', 'vocab_size': 49408}
    times = {'_class_name': 'PNDMScheduler', '_diffusers_version': '0.7.0.dev0', 'beta_end': 0.012, 'beta_schedule': 'scaled_linear',
             'beta_start': 0.00085, 'num_train_timesteps': 1000, 'set_alpha_to_one': False, 'skip_prk_steps': True, 'steps_offset': 1,
             'trained_betas': None, 'clip_sample': False}
    with torch.device('meta'): networks = UNet(unet), Autoencoder(vae), TextEncoder(text)
    assert [sum(p.numel() for p in n.parameters()) for n in networks] == [859_520_964, 83_653_863, 123_060_480]
    SAMPLERS['PNDM'].from_config(times).set_timesteps(50)


def test_sampler_of_each_kind(tmp_path):
    "`load_sampler` finds the class by the one of diffusers that a config names."
    config = json.loads((embedded_folder()/'scheduler/scheduler_config.json').read_text())
    for kind in SAMPLERS.values():
        (tmp_path/'scheduler_config.json').write_text(json.dumps({k: v for k, v in config.items() if k != '_class_name'} | dict(_class_name=kind.library)))
        assert type(by_hand.load_sampler(tmp_path)) is kind


def code_lines(file):
    "The lines of code of a module, by number: no blanks, comments, docstrings and imports; a signature counts as one."
    text = file.read_text(encoding='utf-8')
    empty = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in empty]
    lines = {n for t in tokens for n in range(t.start[0], t.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        words = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        names = isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == '__all__'
        if words or names or isinstance(node, ast.Import | ast.ImportFrom):
            lines -= set(range(node.lineno, node.end_lineno + 1))
        if isinstance(node, ast.FunctionDef):
            lines -= set(range(node.lineno + 1, node.body[0].lineno))     # arguments, below the first line
    return lines


def test_code_lines(tmp_path):
    "The counter itself."
    (tmp_path/'x.py').write_text('"""Words\n\nand more"""\nimport ast\n# a remark\n__all__ = ["f",\n    "g"]\n\ndef f(\n    a, # one\n):\n    "Words"\n    return (a,   # one\n            a)\n')
    assert code_lines(tmp_path/'x.py') == {9, 13, 14}


def test_budget():
    "The five pieces have at most 700 lines of code."
    counts = {f.stem: len(code_lines(f)) for f in FILES}
    assert set(PIECES) < set(counts)
    assert sum(counts[piece] for piece in PIECES) <= 700, counts


@pytest.mark.parametrize('file', FILES, ids=lambda f: f.name)
def test_columns(file):
    "No line is wider than 100 columns, but for the list of names that nbdev writes."
    text = file.read_text(encoding='utf-8')
    listed = {n for node in ast.parse(text).body if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == '__all__'
              for n in range(node.lineno, node.end_lineno + 1)}
    assert {n: len(line) for n, line in enumerate(text.splitlines(), 1) if len(line) > 100 and n not in listed} == {}


@pytest.mark.parametrize('file', FILES, ids=lambda f: f.name)
def test_one_statement_a_line(file):
    "Each statement begins on a line of its own; neither library is imported."
    tree = ast.parse(file.read_text(encoding='utf-8'))
    begins = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    assert sorted({n for n in begins if begins.count(n) > 1}) == []
    names = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
    assert not {name.partition('.')[0] for name in names} & {'diffusers', 'transformers'}
