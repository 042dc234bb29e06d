"""Prompts to train a draft on: users' turns written by the target, short tasks, and translations.

It prints JSONL for ``mcsd distill --prompts``. The sentences to translate and to rewrite are the target's own, from
users' turns and from newspaper articles that it writes first.

    python benchmarks/draft_prompts.py --target smollm2-135m > prompts.jsonl
"""

import argparse
import json
import random
import re
from collections.abc import Sequence
from itertools import product

import mcsd
from mcsd.distill.writer import user_turn_prefix


def _items(text: str) -> list[str]:
    """The items of a text, between bars."""
    return [item.strip() for item in text.split("|") if item.strip()]


TOPICS = _items("""
coffee| bicycles| solar energy| honey bees| the moon| chess| volcanoes| online shopping| bread| electric cars|
friendship| sleep| the human heart| rainforests| public transport| robots| a school library| jazz| football| tea|
climate change| the stock market| dogs| cats| photography| earthquakes| recycling| a family holiday| yoga| painting|
the internet| mobile phones| machine learning| vaccines| tomatoes| a small restaurant| job interviews| remote work|
time management| stress| public speaking| gardening| swimming| mountains| the ocean| dinosaurs| space travel| rivers|
a haunted house| a lost child| a brave knight| an old fisherman| winter| autumn| birthdays| weddings| teamwork|
leadership| a used car| a hotel| credit cards| budgeting| taxes| healthy food| breakfast| exercise| running shoes|
video games| social media| fake news| computer viruses| passwords| databases| a website| programming| prime numbers|
fractions| triangles| probability| gravity| electricity| magnets| light| sound| atoms| water| photosynthesis| evolution|
DNA| the immune system| ancient Rome| Egypt| the industrial revolution| democracy| elections| the French Revolution|
Shakespeare| poetry| movies| theatre| a museum| Paris| Japan| Brazil| Australia| Africa| the desert| farming| horses|
elephants| birds| fish| insects| forests| air pollution| plastic waste| nuclear power| wind turbines| airplanes| trains|
ships| cooking rice| pizza| chocolate| cheese| wine| vegetables| a new product| a startup| marketing| customer service|
a complaint| a thank-you letter| moving to a new city| learning a language| mathematics homework| exams| a science fair
""")

TASKS = _items("""
Explain {} in simple terms.|Write a short story about {}.|Write a poem about {}.|List five facts about {}.|
Give three tips about {}.|What are the advantages of {}?|What are the disadvantages of {}?|Why is {} important?|
Describe {} in one paragraph.|Write a short essay about {}.|Give an example of {}.|What do you know about {}?|
Generate a list of ten words related to {}.|Create a slogan about {}.|Write a dialogue between two people about {}.|
Compare {} with something similar.|Name three things that have to do with {}.|How does {} affect our lives?|
Brainstorm five ideas about {}.|Write an email to a friend about {}.|Create a quiz with three questions about {}.|
Describe the history of {}.|What would happen without {}?|How can I learn more about {}?|
Suggest a title for an article about {}.|Write a haiku about {}.|Generate three questions about {}.|
Make a plan for a project on {}.|Write a news headline about {}.|Summarize what people think about {}.|
Come up with a creative use for {}.|Give a definition of {}.|Construct an argument in favor of {}.|
Write a review of {}.|Tell me a joke about {}.|Describe how {} works.|
What are common mistakes when dealing with {}?|Design a poster about {}. What does it say?|
Invent a character who loves {}.|Identify three problems with {} and propose solutions.|
Write a short speech about {}.|What is the best way to deal with {}?
""")

SENTENCE_TASKS = _items("""
Rewrite the following sentence in the passive voice.|Correct the grammar of the following sentence.|
Summarize the following text in a few words.|Rewrite the sentence so that it is more formal.|
Find the verbs in this sentence.|Find the nouns in this sentence.|Classify the sentiment of the following sentence.|
Paraphrase the following sentence.|Make this sentence more descriptive.|Continue the following text.|
Rewrite the sentence in the past tense.|Turn the following sentence into a question.|
Explain what this sentence means.|Write a headline for the following text.|
Identify the topic of the following text.|Shorten the following sentence.|Edit the following text for clarity.|
Replace one word by a synonym in this sentence.|Answer the following question.|
Categorize the following text as news, opinion or story.|Write a reply to this message.
""")

CALCULATIONS = _items("""
What is the sum of {a} and {b}?|Calculate the area of a rectangle with sides {a} and {b}.|
What is {a} percent of {c}?|Convert {a} kilometers to miles.|Is {c} a prime number?|
List all even numbers between {a} and {c}.|Write a Python function that returns the {n} largest numbers of a list.|
Write a function that reverses a string of {a} characters.|Write a SQL query that returns the {n} newest orders.|
Sort these numbers: {a}, {c}, {b}, {n}.|What is the capital of the country with the code {n}?|
If a train travels {a} km in {n} hours, how fast is it?|Create a schedule with {n} tasks for a busy day.|
Generate {n} random names.|Simplify the fraction {a}/{c}.|Round {c}.{b} to the nearest whole number.|
What is the square root of {c}?|Find the average of {a}, {b} and {c}.
""")

TRANSLATION = "Translate the input English sentence into German.\nInput: {}\nOutput: "
OTHER_TRANSLATIONS = _items("""
Translate the following sentence into French: {}|Translate into German: {}|Translate this sentence to Spanish.\n{}|
Translate the sentence into German.\nInput: {}\nOutput:
""")

ARTICLES = "Write a news report about {} in your town.", "Write a newspaper article about {}."
NUM_TURNS, NUM_ARTICLES = 2200, 220
NUM_TASKS, NUM_SENTENCE_TASKS, NUM_CALCULATIONS = 2600, 600, 450
NUM_TRANSLATIONS, NUM_OTHER_TRANSLATIONS = 1200, 400

_SEED = 7_000_021


def write_turns(engine: mcsd.Engine) -> list[str]:
    """Users' turns (Magpie, Xu et al. 2024, arXiv 2406.08464): the target continues its chat template."""
    prefix = user_turn_prefix(engine.tokenizer)
    params = [mcsd.SamplingParams(top_p=0.95, max_new_tokens=96, seed=_SEED + i) for i in range(NUM_TURNS)]
    texts = (done.text.strip() for done in engine.generate([prefix] * NUM_TURNS, params))
    return [text for text in texts if text]


def write_articles(engine: mcsd.Engine) -> list[str]:
    """Newspaper articles about the topics."""
    requests = [form.format(topic) for form in ARTICLES for topic in TOPICS][:NUM_ARTICLES]
    conversations = [[{"role": "user", "content": request}] for request in requests]
    params = [
        mcsd.SamplingParams(temperature=0.8, top_p=0.95, max_new_tokens=150, seed=i) for i in range(len(requests))
    ]
    return [done.text for done in engine.chat(conversations, params)]


def sentences(texts: Sequence[str]) -> list[str]:
    """The whole sentences of 5 to 32 words in some texts, in alphabetical order."""
    parts = {part.strip() for text in texts for part in re.split(r"(?<=[.!?])\s+|\n+", text)}
    return sorted(part for part in parts if 5 <= len(part.split()) <= 32 and _is_sentence(part))


def _is_sentence(text: str) -> bool:
    return text[0].isupper() and text[-1] in ".!?" and not re.search(r"[\[\]*#{}|]|Dear|Sincerely", text)


def draft_prompts(turns: Sequence[str], articles: Sequence[str]) -> list[str]:
    """All prompts in random order, always the same for the same texts.

    Args:
        turns: of users.
        articles: from which most sentences to translate are taken.
    """
    rng = random.Random(0)
    news = sentences(articles)
    lines = sentences([*articles, *turns])
    rng.shuffle(lines)
    rng.shuffle(news)
    tasks = [task.format(topic) for task, topic in product(TASKS, TOPICS)]
    prompts = [*turns, *rng.sample(tasks, NUM_TASKS)]
    for i in range(NUM_SENTENCE_TASKS):
        task = rng.choice(SENTENCE_TASKS)
        # People often leave the sentence out.
        forms = f"{task}\n{{}}", f"{task} {{}}", f'{task[:-1]}: "{{}}"'
        prompts.append([task, *(form.format(rng.choice(lines)) for form in forms)][i % 4])
    for _ in range(NUM_CALCULATIONS):
        task = rng.choice(CALCULATIONS)
        prompts.append(
            task.format(a=rng.randint(2, 60), b=rng.randint(2, 99), c=rng.randint(20, 400), n=rng.randint(2, 9))
        )
    extra = NUM_TRANSLATIONS // 4
    prompts += [TRANSLATION.format(line) for line in news[: NUM_TRANSLATIONS - extra] + lines[:extra]]
    others = lines[extra : extra + NUM_OTHER_TRANSLATIONS]
    prompts += [rng.choice(OTHER_TRANSLATIONS).format(line) for line in others]
    prompts = sorted(set(prompts))
    rng.shuffle(prompts)
    return prompts


def main() -> None:
    """Print the prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--batch", type=int, default=192)
    args = parser.parse_args()
    engine = mcsd.Engine.load(args.target, "ngram", tree="none", dtype="bfloat16", max_batch=args.batch, max_length=512)
    for prompt in draft_prompts(write_turns(engine), write_articles(engine)):
        print(json.dumps({"prompt": prompt}))


if __name__ == "__main__":
    main()
