"""What ours is timed against computes the same, and is compiled for the case at hand."""

from __future__ import annotations

import torch

from animatelcm.bench import peers

TEXTS = ["a parrot", "", "a Cat on a blue background, jumping"]


def test_the_rivals_parts_are_copies_that_compute_the_same(fresh_model):
    model, pipe = fresh_model, peers.pipeline(fresh_model)
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        tokens = pipe.tokenizer(TEXTS, **options).input_ids
        assert torch.equal(tokens, model.tokens(TEXTS))
        assert torch.allclose(pipe.text_encoder(tokens).last_hidden_state, model.embed(TEXTS), atol=1e-5)
        theirs, ours = pipe.vae.decode(latents).sample, model.vae.decode(latents)
        assert (theirs - ours).norm() <= 1e-5 * ours.norm()
        assert torch.allclose(theirs, ours, atol=1e-4)  # rounding, which depends on the threads
    ours = {value.data_ptr() for network in model.networks.values() for value in network.parameters()}
    theirs = {
        value.data_ptr() for network in (pipe.vae, pipe.text_encoder, pipe.unet) for value in network.parameters()
    }
    assert not ours & theirs


def test_a_network_is_compiled_anew_for_each_case(fresh_model, monkeypatch):
    done = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: done.append("reset"))
    monkeypatch.setattr(torch, "compile", lambda network, **options: done.append(options) or network)
    peers.compiled_pipeline(fresh_model)
    assert done == ["reset", {"dynamic": False}]
