#!/usr/bin/env bash
# The chain that makes the shipped bundle: autoencoder, image model, temporal layers. Each stage resumes where it stopped.
# About two hours on 2 CPU cores; minutes on a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
animatelcm train vae_emoji --resume
animatelcm train vae_emoji_small --resume
animatelcm train base_emoji --resume
animatelcm train teacher_emoji --resume
