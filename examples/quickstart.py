"""mcsd in five minutes: load a model, generate, stream, chat, read the statistics, run a batch.

python examples/quickstart.py  # fetches SmolLM2-135M-Instruct on its first run; its draft comes with mcsd
"""

import mcsd

# tree: candidates per level as here, "chain:4", "none" (plain decoding), or "auto" (the fastest for this machine).
engine = mcsd.Engine.load(target="smollm2-135m", tree="2x2x1", scheme="mcss-wor")
params = mcsd.SamplingParams(temperature=0.8, top_p=0.95, max_new_tokens=48, seed=1)

# Sampling: the text follows the target's distribution, and the seed repeats it.
prompt = "Speculative decoding makes language models faster because"
done = engine.generate(prompt, params)
print(f"== generate\n{prompt}{done.text}")

# What the request cost, and how well drafting went.
stats = done.stats
print("\n== stats")
print(f"{stats.new_tokens} tokens in {stats.target_calls} forwards of the target")
print(f"mean acceptance length: {stats.mean_acceptance_length:.2f} tokens per forward")
print(f"draft acceptance rate: {stats.draft_acceptance_rate:.0%} of the candidates")
print(f"speed: {stats.tokens_per_second:.1f} tokens/s")

# Streaming: one chunk for each forward of the target.
print("\n== stream\nOnce upon a time", end="")
for chunk in engine.stream("Once upon a time", params):
    print(chunk.text, end="", flush=True)

# Chat: the model's own template; at temperature 0 the text is the target's greedy text.
messages = [{"role": "user", "content": "Tell me the capital of France."}]
print("\n\n== chat\n" + engine.chat(messages, mcsd.SamplingParams(temperature=0, max_new_tokens=48)).text)

# Several prompts in one batch.
prompts = ["The sun is", "Water boils at", "Two plus two is"]
print("\n== batch")
for prompt, done in zip(prompts, engine.generate(prompts, params), strict=True):
    print(f"{prompt}{done.text} ({done.finish_reason})")
