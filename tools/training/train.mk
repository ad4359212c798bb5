# The embedded model, one command a step. Each goes on from its last checkpoint in artifacts/ and prints as it goes.
# ARGS="..." hands options to a step (`make train-text ARGS=--help`). Without a GPU: one process of one thread for each core
# (PROCESSES=1 THREADS=2: one of two; which is faster differs from machine to machine).
PROCESSES ?= $(shell $(PY) -c "import os, torch; print(torch.cuda.device_count() or os.cpu_count())" 2>/dev/null || echo 1)
THREADS ?= 1
ALL = OMP_NUM_THREADS=$(THREADS) $(VENV)/bin/torchrun --nproc-per-node $(PROCESSES) -m sd_deepdive.training
ONE = $(PY) -m sd_deepdive.training

KEEP = $(PY) -m tools.training.on_the_way

.PHONY: data keep restore train-autoencoder train-text train-judge train-diffusion assemble quality card train-word
data: $(READY)  ## fetch the pictures and names from their registries, draw and pack them
	@$(ONE).sources $(ARGS)
train-autoencoder: $(READY)  ## step 1: pictures to latents and back
	@$(ALL).autoencoder $(ARGS)
train-text: $(READY)  ## step 2: the text encoder, against a picture tower
	@$(ONE).clip $(ARGS)
train-judge: $(READY)  ## a second such pair, of another seed, for `make quality`
	@$(ONE).clip --judge $(ARGS)
train-diffusion: $(READY)  ## step 3: the UNet, on frozen latents and text states
	@$(ALL).diffusion $(ARGS)
keep: $(READY)  ## write half-precision weights on their way, small enough to commit
	@$(KEEP) keep $(ARGS)
restore: $(READY)  ## put them back: then `make train-diffusion ARGS="--weights artifacts/diffusion/on-the-way ..."`
	@$(KEEP) restore $(ARGS)
assemble: $(READY)  ## put the trained parts, the slice of data and the model card into the package
	@$(PY) -m tools.training.assemble $(ARGS)
quality: $(READY)  ## the quality table: things and styles named right, between a ceiling and a floor
	@$(ONE).quality $(ARGS)
card: $(READY)  ## write the model card again, with the figures of `make quality`
	@$(PY) -m tools.training.card $(ARGS)
train-word: $(READY)  ## a new word for the finished model, for lesson 04: a minute
	@OMP_NUM_THREADS=1 $(ONE).adapt $(ARGS)
