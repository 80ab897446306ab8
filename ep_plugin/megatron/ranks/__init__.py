"""All ranks of a run compare what must be equal, before they first communicate.

meeting.py       how many processes reach one verdict through torch's rendezvous store
lead.py follow.py     rank 0's part in that, and everybody else's
rendezvous.py    the store itself
store.py         the keys of the store, and how patiently it is looked at
answers.py       what a meeting comes to, as sentences
compared.py      what they compare, and the verdict on it
contents.py      files that ranks read: their contents in a few bytes
environment.py   variables that change numbers or collectives
versions.py      packages, and the sources of the plugin and of Megatron
model.py         parameters and layers, once the model is built
sentence.py      differences as one sentence
"""
