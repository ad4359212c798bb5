"""Sheets of pictures, written as PNG while training goes on."""
from pathlib import Path
import torch
from PIL import Image

def sheet(pixels: torch.Tensor, columns: int, path: Path):
    "Write pictures (N,3,H,W) in -1..1 as one PNG, row by row."
    rows = [torch.cat(list(r), 2) for r in pixels.cpu().split(columns) if len(r)==columns]
    page = ((torch.cat(rows, 1).clamp(-1, 1)+1)*127.5).round().byte().permute(1, 2, 0).numpy()
    path.parent.mkdir(parents=True, exist_ok=True); Image.fromarray(page).save(path)
