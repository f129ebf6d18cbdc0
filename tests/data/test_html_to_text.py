"""Prose out of pages as Sphinx and DocBook write them, and nothing else of them."""

from __future__ import annotations

from qat.data import html_to_text

SPHINX = """<!DOCTYPE html><html><head><title>T</title><script>let a = "head";</script></head><body>
<nav class="menu"><ul><li><a href="#">Contents of the site</a></li></ul></nav>
<div class="body" role="main"><section id="x"><h1><code class="xref"><span class="pre">bisect</span></code> — Array
bisection algorithm<a class="headerlink" href="#x" title="Permalink">¶</a></h1>
<div class="contents local topic"><ul><li>Examples</li></ul></div>
<p><strong>Source code:</strong> <a href="y">Lib/bisect.py</a></p>
<p>This module keeps a list in sorted order
  without having to sort it after each insertion.<br/>It is small.</p>
<div class="highlight-python3 notranslate"><div class="highlight"><pre>def find(a): <span>pass</span></pre></div></div>
<p>After it.</p>
<table class="docutils"><tr><td>a cell</td></tr></table>
<dl class="py function"><dt class="sig">insort(<em>a</em>, <em>x</em>)<a class="headerlink" href="#z">¶</a></dt>
<dd><p>Inserts &amp; keeps order:</p><ul class="simple"><li><p>left of equals</p></li><li>right of them</li></ul>
</dd></dl><div class="toctree-wrapper compound"><ul><li>Next page</li></ul></div>
<!-- no --><script>b()</script></section></div>
<div class="sphinxsidebar">Aside</div></body></html>"""

DOCBOOK = """<?xml version="1.0" encoding="UTF-8" standalone="no"?>
<html xmlns="http://www.w3.org/1999/xhtml"><head><title>13.1.</title></head><body id="docContent">
<div class="navheader"><table><tr><td>Prev</td></tr></table><hr /></div>
<div class="sect1"><h2 class="title">13.1.\u00a0Introduction</h2><div class="toc"><dl><dt>Part</dt></dl></div>
<a id="i" class="indexterm"></a><p>
    <span class="productname">PostgreSQL</span> provides tools
    (“<acronym>MVCC</acronym>”).
<pre class="programlisting">SELECT 1;</pre>And more.</p></div><div class="navfooter"><p>Next</p></div></body></html>"""


def test_code_tables_and_navigation_go_and_each_paragraph_is_a_line():
    assert html_to_text.paragraphs(SPHINX.encode()) == [
        "bisect — Array bisection algorithm",
        "Source code: Lib/bisect.py",
        "This module keeps a list in sorted order without having to sort it after each insertion.",
        "It is small.",
        "After it.",
        "insort(a, x)",
        "Inserts & keeps order:",
        "left of equals",
        "right of them",
    ]
    assert html_to_text.paragraphs(DOCBOOK.encode()) == [
        "13.1. Introduction",
        "PostgreSQL provides tools (“MVCC”).",
        "And more.",
    ]


def page(*paragraphs: str) -> bytes:
    return f"<html><body>{''.join(f'<p>{each}</p>' for each in paragraphs)}</body></html>".encode()


SENTENCE = "A baker's dozen (thirteen) is what the “old” bakers sold, in 1700 or so."
NAMES = "Ann Lee a@b.org Maintained drivers/net/ include/net/ net/core.c git://d.e/f"


def test_a_page_counts_when_half_of_it_is_in_sentences():
    assert html_to_text.document(page("Title", SENTENCE)) == f"Title\n\n{SENTENCE}"
    assert html_to_text.document(page(SENTENCE, NAMES[:60])) and not html_to_text.document(page(SENTENCE, NAMES))
    assert html_to_text.document(page("Index", "alpha, 1", "beta, 2")) == html_to_text.document(page()) == ""
    assert html_to_text.prose_size(f"A heading\n\n{SENTENCE}\n\n{NAMES}") == len(SENTENCE)
