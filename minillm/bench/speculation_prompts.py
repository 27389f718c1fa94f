"""Ten requests whose answers take much from what they are given: five to summarise, five to edit. Written for this."""

from __future__ import annotations

from minillm.llm import LLM, Prompt

__all__ = ["PROMPTS", "asked"]

MINUTES = """The committee met on Tuesday evening in the village hall to discuss the annual budget. The treasurer, Mrs \
Ellis, presented the accounts for the past year and explained that the repair of the roof had cost more than was \
planned. Mr Hart asked whether the library could stay open on Saturdays. After a long debate the members agreed to \
repair the north wall before the winter, to keep the library open on Saturdays until March, and to ask the council \
for a grant of four thousand pounds. The next meeting is on the first Tuesday of November."""

RIVER = """The river rises in the hills above the town of Marlow and flows north for ninety miles to the sea. In \
spring, melting snow makes it rise by up to two metres, and the meadows on both banks are flooded for weeks. Farmers \
have used this water since the twelfth century: a system of ditches and wooden gates leads it to fields that would \
otherwise be too dry. In 1954 a dam was built near its source, and the floods became smaller. Since then the number \
of water birds has fallen by half, and some farmers ask that the gates of the dam be opened every April."""

ENGINE = """A language model engine keeps the keys and values of all tokens that it has read in a cache. The cache is \
divided into blocks of sixteen tokens, so that memory can be given out as it is needed. When a new request begins with \
the same tokens as an earlier one, the blocks of the earlier one are found by a hash and shared. When no block is \
left, the request that came last gives up its blocks and is computed again later. In this way the engine serves many \
requests at once, and none of them waits for ever."""

LETTER = """dear mr collins, thank you for your letter of the 3rd of may. we are sorry to hear that the lamp arrived \
broken. we have sent you a new lamp today by post, and it should arrive on friday. please keep the broken lamp until \
our driver collects it next week. if the new lamp does not work, please call us and we will return your money at once. \
yours sincerely, anna field, customer service"""

RECIPE = """Heat the oven to 200 degrees. Mix the flour, the salt and the butter in a large bowl until the mixture \
looks like sand. Add the cold water slowly and press the dough together. Wrap the dough and leave it in a cold place \
for one hour. Cut the apples into thin slices and mix the apples with the sugar and the cinnamon. Roll the dough out, \
put the apples in the middle and fold the edges over the apples. Bake for forty minutes."""

CODE = """def total_price(items, discount):
    total = 0
    for item in items:
        price = item["price"]
        count = item["count"]
        total = total + price * count
    if discount > 0:
        total = total - total * discount
    return total
"""

PROMPTS = (
    f"Summarise the following minutes in three sentences, using its own words:\n\n{MINUTES}",
    f"Summarise the following text in three sentences, using its own words:\n\n{RIVER}",
    f"List the main facts of the following text, one per line:\n\n{RIVER}",
    f"List the decisions that were taken in the following minutes, one per line:\n\n{MINUTES}",
    f"Summarise the following text for a beginner, using its own words:\n\n{ENGINE}",
    f"Write the following letter again with capital letters where they belong:\n\n{LETTER}",
    f"Write the following recipe again, with each sentence on a line of its own:\n\n{RECIPE}",
    f"Write the following text again, with the word 'request' replaced by 'query':\n\n{ENGINE}",
    f"Write the following function again, with the name total_price replaced by order_total:\n\n{CODE}",
    f"Write the following text again and correct any mistakes:\n\n{MINUTES}",
)


def asked(llm: LLM) -> list[Prompt]:
    """The prompts as a model takes them: messages if it has a chat template, else plain texts."""
    if not llm.tokenizer.has_chat_template:
        return list(PROMPTS)
    return [[{"role": "user", "content": text}] for text in PROMPTS]
