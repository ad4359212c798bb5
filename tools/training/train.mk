# The embedded model, one command a step. Each step goes on from its last checkpoint in artifacts/ and prints as it goes.
# ARGS="..." hands options to a step (`make train-text ARGS=--help`). Without a GPU: one process of one thread for each core.
PROCESSES ?= $(shell $(PY) -c "import os, torch; print(torch.cuda.device_count() or os.cpu_count())" 2>/dev/null || echo 1)
PRECISION ?= bf16
ONE = OMP_NUM_THREADS=1 $(VENV)/bin/torchrun --nproc-per-node 1 --master-port $(1) -m tools.training
ALL = OMP_NUM_THREADS=1 $(VENV)/bin/torchrun --nproc-per-node $(PROCESSES) -m tools.training
TRAIN_READY := $(VENV)/.train-ready

.PHONY: data train-autoencoder train-text train-judge train-diffusion assemble quality train-word
$(TRAIN_READY): $(READY)
	@$(PY) -m pip install -q -c lock.txt -e .[train] && touch $@

data: $(TRAIN_READY)  ## fetch the pictures and names from their registries, draw and pack them
	@$(PY) -m tools.training.data
train-autoencoder: $(TRAIN_READY)  ## step 1: pictures to latents and back
	@$(ALL).autoencoder --precision $(PRECISION) $(ARGS)
train-text: $(TRAIN_READY)  ## step 2: the text encoder, against a picture tower
	@$(call ONE,29501).text --precision $(PRECISION) $(ARGS)
train-judge: $(TRAIN_READY)  ## a second such pair, of another seed, for `make quality`
	@$(call ONE,29502).text --judge --precision $(PRECISION) $(ARGS)
train-diffusion: $(TRAIN_READY)  ## step 3: the UNet, on frozen latents and text states
	@$(ALL).diffusion $(ARGS)
assemble: $(TRAIN_READY)  ## put the trained parts, the slice of data and the model card into the package
	@$(PY) -m tools.training.assemble
quality: $(TRAIN_READY)  ## the quality table: things and styles named right, between a ceiling and a floor
	@$(PY) -m tools.training.quality
train-word: $(READY)  ## a new word for the finished model, for lesson 04: a minute
	@OMP_NUM_THREADS=1 $(PY) -m tools.training.word $(ARGS)
