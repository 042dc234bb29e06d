"""The prompts of benchmarks/draft_prompts.py."""

import draft_prompts as prompts

TURNS = ["Can you help me with my homework? I have no idea where to start with it.", "hello"]
ARTICLES = [
    f"**Bread**\nBaker number {i} opened a shop in the old town today. It sells rye bread to {i} guests. Dear"
    for i in range(1200)
]


def test_whole_sentences_are_found() -> None:
    text = "A dog ran over the road. it was late in the night. Dear Tom, how are you? # One two three four.\nToo short."
    assert prompts.sentences([text, text]) == ["A dog ran over the road."]


def test_all_kinds_of_prompts_are_there_in_the_same_order_each_time() -> None:
    made = prompts.draft_prompts(TURNS, ARTICLES)
    assert made == prompts.draft_prompts(TURNS, ARTICLES)
    assert len(made) == len(set(made))
    assert set(TURNS) < set(made)
    translations = [prompt for prompt in made if prompt.startswith(prompts.TRANSLATION.partition("{}")[0])]
    # Some sentences are drawn twice: as news, and from all texts.
    assert 0.75 * prompts.NUM_TRANSLATIONS <= len(translations) <= prompts.NUM_TRANSLATIONS
    assert any("rye bread" in prompt for prompt in translations)
    tasks = {task.format(topic) for task in prompts.TASKS for topic in prompts.TOPICS}
    assert len(tasks & set(made)) == prompts.NUM_TASKS
    assert "Rewrite the sentence in the past tense." in made
