"""BibTeX entries of papers that several methods, or a method and a score, come from."""

KOJIMA_2024 = """@inproceedings{kojima2024multilingual,
  title = {On the Multilingual Ability of Decoder-based Pre-trained Language Models: Finding and Controlling
           Language-Specific Neurons},
  author = {Kojima, Takeshi and Okimura, Itsuki and Iwasawa, Yusuke and Yanaka, Hitomi and Matsuo, Yutaka},
  booktitle = {Proceedings of the 2024 Conference of the North American Chapter of the Association for Computational
               Linguistics},
  year = {2024},
  eprint = {2404.02431},
  archivePrefix = {arXiv}
}"""

RAHMANISA_2025 = """@misc{rahmanisa2025unveiling,
  title = {Unveiling the Influence of Amplifying Language-Specific Neurons},
  author = {Rahmanisa, Inaya and others},
  year = {2025},
  eprint = {2507.22581},
  archivePrefix = {arXiv}
}"""
