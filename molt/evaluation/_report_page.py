"""The report's page: Jinja2 template and style."""

MARK = '<meta name="generator" content="molt evaluate">'

STYLE = """
:root { color-scheme: light dark; --ground: #fbfbfa; --card: #ffffff; --text: #1d2226; --soft: #5b646c;
  --line: #dfe3e6; --accent: #0b6b6b; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14181b; --card: #1c2125; --text: #e8ebed; --soft: #a3adb5; --line: #31383e; --accent: #6cc5c0; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text); overflow-wrap: break-word;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 40px 24px 56px; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 12px; }
h2 { font-size: 1.3rem; margin: 0 0 8px; }
p { margin: 0 0 10px; max-width: 50rem; }
.soft { color: var(--soft); font-size: .9rem; }
section { margin-top: 40px; padding-top: 24px; border-top: 1px solid var(--line); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; margin: 0 0 14px; }
th, td { text-align: right; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
svg { width: 100%; max-width: 760px; height: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; font-size: 12px; }
svg text { fill: var(--soft); }
svg .grid { stroke: var(--line); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: .875rem; margin: 8px 0; padding: 0;
  list-style: none; }
.dot { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 6px; }
.bar { display: flex; height: 22px; max-width: 760px; border-radius: 6px; overflow: hidden; }
.photos { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 18px 14px; padding: 0;
  list-style: none; }
figure { margin: 0; }
figure img { display: block; width: 100%; height: auto; border-radius: 6px; }
figcaption { font-size: .84rem; line-height: 1.4; color: var(--soft); margin-top: 6px; }
figcaption b { color: var(--text); }
footer { margin-top: 40px; font-size: .8125rem; color: var(--soft); }
"""

TEMPLATE = (
    """{% macro share(value) %}{{ "%.2f"|format(value) }}{% endmacro %}
{% macro span(pair) %}{{ "%.1f to %.1f"|format(pair[0], pair[1]) }}{% endmacro %}
{% macro figures(rows, head, fixed) %}
<div class="scroll"><table><thead><tr><th>{{ head }}</th><th>photos</th><th>{{ metric_name("max_box_acc", fixed) }}</th>
<th>{{ metric_name("max_box_acc_v2", fixed) }}</th><th>mean IoU</th></tr></thead><tbody>
{% for row in rows %}<tr><td>{{ row.title }}</td>
<td>{{ row.photos }}{% if "pairs" in row %} ({{ row.pairs }})
{% endif %}</td><td>{{ share(row.max_box_acc) }}</td>
<td>{{ share(row.max_box_acc_v2) }}</td><td>{{ share(row.mean_iou) }}</td></tr>
{% endfor %}</tbody></table></div>
{% endmacro %}
{% macro legend(names) %}<ul class="legend">{% for name in names %}<li><span class="dot"
style="background:{{ colour(loop.index0) }}"></span>{{ name }}</li>{% endfor %}</ul>{% endmacro %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
"""
    + MARK
    + """
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
<main>
<header>
<h1>{{ title }}</h1>
{% for line in lead %}<p class="soft">{{ line }}</p>
{% endfor %}</header>
{% if comparison %}
<section id="comparison">
<h2>Runs on the {{ counted(comparison) }} that all share</h2>
<div class="scroll"><table><thead><tr><th>run</th>{% for metric in comparison.scores %}
<th>{{ metric_name(metric, comparison.fixed) }}, %</th><th>95 % interval</th>{% endfor %}</tr></thead><tbody>
{% for name in comparison.runs %}{% set number = loop.index0 %}<tr><td>{{ name }}</td>
{% for entries in comparison.scores.values() %}<td>{{ share(entries[number].value) }}</td>
<td>{{ span(entries[number].interval) }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
<h2>Differences, photo by photo</h2>
<p class="soft">The same photos are drawn for both runs, {{ comparison.draws }} times. An interval that holds 0 leaves
open which run is better.</p>
<div class="scroll"><table><thead><tr><th>runs</th><th class="text">metric</th><th>points</th><th>95 % interval</th>
</tr></thead><tbody>
{% for entry in comparison.differences %}<tr><td>{{ entry.run }} &minus; {{ entry.against }}</td>
<td class="text">{{ metric_name(entry.metric, comparison.fixed) }}</td><td>{{ "%+.2f"|format(entry.difference) }}</td>
<td>{{ "%+.1f to %+.1f"|format(entry.interval[0], entry.interval[1]) }}</td></tr>
{% endfor %}</tbody></table></div>
{% for left in comparison.unshared %}<p class="soft">{{ left.count }} {{ units(comparison) }} left out,
{{ left.reason }}:
{{ left.photos|join(", ") }}{% if left.count > left.photos|length %}, &hellip;{% endif %}</p>
{% endfor %}{% for other in comparison.protocol %}<p class="soft">Protocols differ in {{ other.setting }}:
{% for name, value in other["values"].items() %}{{ name }} {{ value }}{{ "; " if not loop.last }}{% endfor %}</p>
{% endfor %}</section>
{% endif %}
{% for run in runs %}
<section class="run">
<h2>{{ run.name }}</h2>
<div class="scroll"><table><thead><tr><th>metric</th><th>%</th><th>95 % interval</th><th>photos</th></tr></thead><tbody>
{% for name, entry in run.info.scores.items() %}<tr><td>{{ metric_name(name, run.fixed) }}</td>
<td>{{ share(entry.value) }}</td><td>{{ span(entry.interval) }}</td>
<td>{{ entry.photos }}{% if "pairs" in entry %} ({{ entry.pairs }} {{ units(entry) }}){% endif %}</td></tr>
{% endfor %}</tbody></table></div>
<p class="soft protocol">Protocol: {{ run.protocol }}.</p>
{% for used in run.info.method.get("weights", []) %}<p class="soft">Weights: {{ used.model }}, {{ used.source }}; saw
pixel masks in training: {{ used.saw_masks }}.</p>
{% endfor %}
{% if run.info.by_iou %}
{% if run.plot %}<h2>Accuracy against threshold</h2>
{{ run.plot }}
{{ legend(run.lines) }}
{% endif %}
<div class="scroll"><table><thead><tr><th>box</th><th>IoU at least</th><th>%</th><th>95 % interval</th>
<th>{{ "fixed" if run.fixed else "best" }} threshold</th></tr></thead><tbody>
{% for entry in run.info.by_iou %}<tr>
<td>{% if entry.kind == "v1" %}largest contour ({{ metric_name("max_box_acc", run.fixed) }}){% else %}
any contour (V2){% endif %}</td><td>{{ entry.iou }}</td>
<td>{{ share(entry.value) }}</td><td>{{ span(entry.interval) }}</td><td>{{ "%.3g"|format(entry.threshold) }}</td></tr>
{% endfor %}</tbody></table></div>
<h2>What is wrong with the largest box</h2>
<div class="bar">{% for kind, number in run.info.errors.items() if number %}<span title="{{ kind }}: {{ number }}"
style="flex:{{ number }};background:{{ colour(error_colour(kind)) }}"></span>{% endfor %}</div>
<ul class="legend">{% for kind, number in run.info.errors.items() %}<li><span class="dot"
style="background:{{ colour(error_colour(kind)) }}"></span>{{ error_name(kind) }}: {{ number }}</li>{% endfor %}</ul>
<h2>By size of the object</h2>
{{ figures(run.sizes, "largest true box, share of the photo", run.fixed) }}
<h2>By class</h2>
{{ figures(run.classes, "class", run.fixed) }}
{% if run.more_classes %}<p class="soft">The {{ run.classes|length }} classes of lowest accuracy; run.json has
{{ run.more_classes }} more.</p>{% endif %}
{% endif %}
{% for group, pictures in run.pictures %}
<h2>{{ group }}</h2>
<ul class="photos">{% for one in pictures %}<li><figure>{% if one.data %}<img src="{{ one.data }}"
alt="{{ one.name }}: heat map, true and predicted boxes">{% endif %}<figcaption><b>{{ one.name }}</b><br>
{{ one.label }}: IoU {{ "%.2f"|format(one.iou) }}, {{ error_name(one.error) }}{% if one.note %}<br>{{ one.note }}
{% endif %}</figcaption></figure></li>
{% endfor %}</ul>
{% endfor %}
{% if run.pictures %}<p class="soft">White: true boxes. Orange: the largest contour's box
at {{ "the fixed" if run.fixed else "MaxBoxAcc's" }} threshold.
</p>{% endif %}
{% if run.info.problems.count %}
<h2>Problems: {{ run.info.problems.count }}</h2>
<div class="scroll"><table><thead><tr><th>file</th><th class="text">what came</th><th class="text">expected</th></tr>
</thead><tbody>
{% for problem in run.problems %}<tr><td>{{ problem.file }}{% if problem.line %}:{{ problem.line }}{% endif %}</td>
<td class="text">{{ problem.message }}</td><td class="text">{{ problem.expected }}</td></tr>
{% endfor %}</tbody></table></div>
{% if run.info.problems.count > run.problems|length %}<p class="soft">The first {{ run.problems|length }}; run.json has
all.</p>{% endif %}
{% endif %}
</section>
{% endfor %}
<footer>Made by molt {{ version }}; this file holds everything it shows.</footer>
</main>
</body>
</html>
"""
)
