"""Small Jinja expressions for template_parity_test.py. Each is rendered with CONTEXT by both engines; where Python raises, we
must refuse, too. Long because it is a list: one expression a line."""

CONTEXT = {
    "s": "Hello, World",
    "u": "Grüße, ΑΣ 世界 😀 ǆ ß",
    "w": "  padded\t\n",
    "lines": "one\ntwo\n\n  three",
    "n": 7,
    "neg": -7,
    "f": 3.14159,
    "z": 0,
    "t": True,
    "none_value": None,
    "l": [3, 1, 2],
    "names": ["bob", "Alice", "carol", "alice"],
    "nested": [[1, [2, 3]], {"k": [4]}],
    "d": {"b": 2, "a": 1, "C": 3},
    "e": [],
    "users": [{"name": "Zoe", "age": 30, "x": {"y": 1}}, {"name": "amy", "age": 25, "on": True}, {"name": "Bob", "age": 30}],
    "keys": {"items": "I", "get": "G", "pop": 1, "x y": 2, "0": "zero"},
    "floats": [0.1, 1e16, 1e-5, 123456789.125, 1.0, -0.0, 1e22, 5e-324, 0.1 + 0.2, 1e15, 9999999999999998.0],
    "quotes": ["it's", 'say "hi"', "both ' and \"", "tab\t nl\n bs\\ nul\x01 é 世 \u200b \U000e0001"],
}

EXPRESSIONS = r"""
1 + 2 * 3
(1 + 2) * 3
7 // 2 ~ -7 // 2 ~ 7 % 3 ~ -7 % 3 ~ 7 % -3
7 / 2
6 / 2
2 ** 10
2 ** -1
-2 ** 2
2 ** 3 ** 2
1 / 0
1 // 0
1 % 0
1.5 // 0.5
-1.5 // 0.4
-1.5 % 0.4
1.5 % -0.4
1e3
1_000 + 0x1f + 0b101 + 0o17
1.5e-7
0xF_F
00
07
true + 1
'a' * 3
3 * 'ab'
[1] * 2 + [2]
(1, 2) + (3,)
'a' + 1
1 + 'a'
[1] + (2,)
'a' - 'b'
none + 1
missing + 1
-missing
-'a'
+n
-n ~ -f ~ -t
- - 3
1 < 2 < 3
1 < 3 < 2
3 > 2 >= 2
1 == 1.0
1 == true
'1' == 1
none == none
missing == missing2
missing == none
missing != 1
'a' < 'b'
'a' < 1
[1, 2] < [1, 3]
(1, 2) >= (1, 2)
{} < {}
none < 1
missing < 1
1 in [1, 2]
'a' in 'cat'
1 in 'cat'
'a' not in 'cat'
'a' in d
2 in d.values()
'a' in missing
'a' in none
1 in 5
3 in range(5)
true and 0
'' or 'x'
not ''
not missing
none or missing or 'z'
0 and missing.foo
1 if t else 2
1 if z else 2
1 if z
(1 if z) is defined
(1 if z).foo
'a' if z else 'b' if z else 'c'
s[0] ~ s[-1]
s[100]
s[100] is defined
s[1:4]
s[::-1]
s[-3:]
s[:-3]
s[::2]
s[5:2]
s[5:2:-1]
s[1:'a']
s['a']
u[7:12]
u[::-1]
u|length
l[0] ~ l[-1] ~ l[1:]
l[::-1]
l[5]
l[5].foo
l.0
l['a']
l[1.5]
(1, 2, 3)[1:]
(1, 2, 3)[::-2]
range(10)[2:8:3]
range(10)[2]
range(10)[20]
d['a'] ~ d.b ~ d.get('C')
d.missing
d.missing.foo
d['missing']['foo']
d.get('zz')
d.get('zz', 5)
d.items()
d.keys()
d.values()
d.items()|list
d[[1]]
keys['items']
keys.get('get')
keys.pop
keys.pop()
keys['x y']
keys[0]
keys.0
l.append(1)
l.append
d.update({})
l.index(2)
l.index(9)
l.count(1)
(1, 1).count(1)
s.__class__
s.__class__.foo
d.__init__
none.foo
none.foo.bar
none[0]
d[1:2]
missing[1:]
none_value[:]
n[::]
(names|map)|list
(users|selectattr)|list
joiner()()
(s|attr('upper'))()
n.foo
n[0]
n()
s()
missing()
missing.foo
missing[0]
d()
nested
nested[0][1][0]
floats
floats|join(' ')
quotes
quotes|map('string')|list
[true, none, 1.0, 'x', (1,), (), {}, {'a': (1, 2)}]
{1: 'a', 'b': none, 2.5: [], none: 1, true: 2}
{[1]: 2}
'a' 'b' "c"
'\x41\u00e9\n\t\\ \' \q \101'
"\U0001F600"
'\x4'
'a' ~ 1 ~ none ~ true ~ 1.0 ~ [1]
missing ~ 'x'
[missing]
(missing,)|string
s.upper() ~ s.lower() ~ s.title() ~ s.capitalize() ~ s.swapcase()
u.upper()
u.lower()
u.title()
u.capitalize()
'ΑΣ ΑΣΑ'.lower()
"they're bill's".title()
"they're bill's-x (foo [bar"|title
u|title
u|upper
u|lower
u|capitalize
w.strip()
w.lstrip()|length
w.rstrip()|length
'xxaxx'.strip('x')
'xyaxy'.lstrip('yx')
'xyaxy'.rstrip('yx')
'a'.strip(1)
s.split()
s.split(',')
s.split(', ', 1)
'a,b,c'.split(',', maxsplit=1)
'a,b,c'.rsplit(',', 1)
' a  b c '.split()
' a  b c '.split(none, 1)
' a  b c '.rsplit(none, 1)
' a b '.split(' ')
''.split()
''.split(',')
'a'.split('')
'a\nb\r\nc\n'.splitlines()
'a\nb\n'.splitlines(true)
s.startswith('Hell')
s.startswith(('x', 'H'))
s.startswith('ello', 1)
s.startswith(1)
s.endswith('ld')
s.endswith(('x', 'y'))
s.replace('l', 'L')
s.replace('l', 'L', 1)
s.replace('', '-')
s.replace('l')
s.replace(1, 2)
s.find('o') ~ s.rfind('o') ~ s.find('zz') ~ s.find('o', 5)
u.find('世')
s.index('zz')
s.count('l') ~ s.count('') ~ s.count('l', 5)
'-'.join(['a', 'b'])
'-'.join([1])
'-'.join('abc')
'a'.center(5, '*') ~ 'ab'.center(5, '*') ~ 'a'.ljust(3, '.') ~ 'a'.rjust(3, '.')
'5'.zfill(3) ~ '-5'.zfill(4)
'a=b=c'.partition('=')
'a=b=c'.rpartition('=')
'abc'.partition('=')
'abc'.isalpha() ~ '123'.isdigit() ~ 'a1'.isalnum() ~ ' '.isspace() ~ 'AB'.isupper() ~ 'ab'.islower() ~ ''.isalpha() ~ 'é'.isalpha()
'prefix-x'.removeprefix('prefix-') ~ 'x.txt'.removesuffix('.txt')
'{} {}'.format(1, 'a')
'{0} {1} {0}'.format(1, 2)
'{a} {b[0]} {c.x}'.format(a=1, b=[2], c={'x': 3})
'{:>5}|{:<5}|{:^5}|{:*^7}'.format('a', 'b', 'c', 'd')
'{:05d} {:+d} {:x} {:#x} {:b} {:,}'.format(42, 42, 255, 255, 5, 1234567)
'{:.2f} {:8.3f} {:e} {:g} {:%}'.format(f, f, f, f, 0.5)
'{!r} {!s}'.format('a', 'b')
'{{}} {}'.format(1)
'{'.format(1)
'}'.format(1)
'{} {}'.format(1)
'{0} {}'.format(1)
'{x}'.format(1)
'{:d}'.format('a')
'{:5}'.format(none)
'{:{w}}'.format('a', w=4)
'{:.2}'.format('abc')
'{:5}|{:5}'.format(1, true)
'%s %d %r' % ('a', 1, 'b')
'%s' % 'x'
'%s' % [1]
'%s' % (1, 2)
'%s %s' % 1
'%d' % 'a'
'%d' % 3.9
'%5d|%-5d|%05d|%+d' % (1, 2, 3, 4)
'%.2f %e %g %x %X %o %c %%' % (f, f, f, 255, 255, 8, 'c')
'%(a)s %(b)d' % {'a': 1, 'b': 2}
'%(a)s' % 1
'%(zz)s' % {'a': 1}
'%z' % 1
'%' % 1
'abc' % ()
'abc' % 1
'abc' % []
'%*d' % (5, 42)
'%s %s'|format('a', 'b')
'%(x)s'|format(x=1)
s|upper|lower|length
w|trim
'xax'|trim('x')
s|replace('l', 'L')|replace('o', '0', 1)
123|replace(1, 'x')
n|string|length
none|string
missing|string
missing|upper
missing|length
missing|list
none|length
none|list
5|length
5|list
e|length
d|length
range(5)|length
'abc'|list
d|list
'abc'|first ~ 'abc'|last
e|first
e|first is defined
e|last
l|first ~ l|last
d|first
range(3)|last
l|reverse|list
'abc'|reverse
d|reverse|list
5|reverse
l|sort
l|sort(reverse=true)
l|sort(true)
names|sort
names|sort(case_sensitive=true)
users|sort(attribute='age')|map(attribute='name')|list
users|sort(attribute='age,name')|map(attribute='name')|list
users|sort(attribute='age', reverse=true)|map(attribute='name')|list
[1, 'a']|sort
[none, 1]|sort
d|dictsort
d|dictsort(true)
d|dictsort(false, 'value')
d|dictsort(by='value', reverse=true)
d|dictsort(by='x')
l|dictsort
d|items|list
missing|items|list
l|items|list
names|unique|list
names|unique(case_sensitive=true)|list
[1, 1.0, true, 2]|unique|list
[[1]]|unique|list
l|min ~ l|max ~ names|min ~ names|max
e|min
users|max(attribute='age')
users|min(attribute='name')
l|sum
[1.5, 2]|sum
users|sum(attribute='age')
users|sum('age', 10)
['a']|sum
[[1], [2]]|sum(start=[])
l|join
l|join(', ')
l|join(1)
users|join(', ', attribute='name')
'abc'|join('-')
missing|join
none|join
d|join(',')
users|map(attribute='name')|join(',')
users|map(attribute='x.y')|list
users|map(attribute='on', default='no')|list
users|map(attribute='x.y', default=0)|list
names|map('upper')|list
names|map('replace', 'a', 'b')|list
names|map('nofilter')|list
l|map('string')|join
users|selectattr('on')|map(attribute='name')|list
users|selectattr('on', 'defined')|list|length
users|selectattr('age', 'equalto', 30)|map(attribute='name')|list
users|selectattr('age', '==', 30)|list|length
users|selectattr('age', '>', 26)|list|length
users|selectattr('name', 'in', ['Zoe', 'Bob'])|list|length
users|rejectattr('age', 'eq', 30)|map(attribute='name')|list
users|selectattr('x.y', 'eq', 1)|list|length
users|selectattr('name')|first
users|selectattr('name')|last
users|selectattr('name')|length
l|select('odd')|list
l|select('gt', 1)|list
l|reject('odd')|list
[0, 1, '', 'a', none]|select|list
[0, 1, '', 'a', none]|reject|list
l|select('nosuch')|list
none|map('upper')|list
missing|selectattr('a')|list
[1, 2, 3, 4, 5]|batch(2)|list
[1, 2, 3]|batch(2, 'x')|list
users|groupby('age')|list|length
users|groupby('age')|map('first')|list
names|groupby(0)|map('last')|list
missing|default('d')
missing|default
none|default('d')
none|default('d', true)
''|default('d', boolean=true)
missing|d('x')
d.zz|default('y')
missing.foo|default('y')
'42'|int ~ '4.9'|int ~ 'x'|int ~ 4.9|int ~ true|int ~ none|int ~ ' 5 '|int ~ '-3'|int
'x'|int(7) ~ 'ff'|int(0, 16) ~ '0x1f'|int(0, 16) ~ '1_000'|int ~ '1e3'|int
[]|int
missing|int
'3.5'|float ~ 'x'|float ~ 3|float ~ 'x'|float(1.5) ~ 'inf'|float ~ '1e400'|float
missing|float
42.55|round ~ 42.55|round(1) ~ 42.55|round(1, 'floor') ~ 42.55|round(1, 'ceil') ~ 42|round ~ 2.5|round ~ 3.5|round
1234|round(-2) ~ 1234.5|round(-2) ~ 2.675|round(2)
42.55|round|int
'a'|round
1|round(0, 'x')
-5|abs
5|abs ~ -5.5|abs ~ neg|abs
'a'|abs
lines|indent
lines|indent(2, true)
lines|indent('> ', first=true, blank=true)
lines|indent(width=1)
5|indent
'<a href="x">\'&'|escape
'<a>'|e|e
'<a>'|safe|e
'<a>'|e ~ '<b>'
('<a>'|e) + '<b>'
'<a>'|forceescape
'hello world foo bar baz'|truncate(15)
'hello world foo bar baz'|truncate(15, true)
'hello world foo bar baz'|truncate(15, false, '!', 0)
'hello'|truncate(5)
'a b-c d_e'|wordcount
'a b/ü?'|urlencode
'abc'|center(9)
d|tojson
nested|tojson
users|tojson(indent=2)
users|tojson(indent=4)|length
d|tojson(sort_keys=true)
d|tojson(separators=(',', ':'))
u|tojson
u|tojson(ensure_ascii=true)
quotes|tojson
floats|tojson
'<&>\''|tojson
none|tojson ~ true|tojson ~ 1|tojson ~ 1.0|tojson ~ ''|tojson
[]|tojson(indent=2) ~ {}|tojson(indent=2) ~ [[], {}]|tojson(indent=2)
(1, 2)|tojson
'\x00\x01\x1e\x1f\x20\x7e\x7f'|tojson
{1: 2, none: 3, true: 4}|tojson
missing|tojson
range(3)|tojson
d.items()|tojson
'a'|tojson(1, 2, 3, 4, 5)
n is odd ~ n is even ~ n is divisibleby 7 ~ n is divisibleby(3)
'a' is odd
s is string ~ n is string ~ n is number ~ f is number ~ t is number ~ t is integer ~ n is integer ~ f is float ~ t is boolean
none is none ~ none_value is none ~ missing is none
d is mapping ~ l is mapping ~ l is iterable ~ s is iterable ~ n is iterable ~ l is sequence ~ d is sequence ~ n is sequence
missing is defined ~ missing is undefined ~ missing is not defined ~ s is defined
missing is iterable ~ missing is sequence ~ missing is string ~ missing is callable
d.items() is iterable ~ d.items() is sequence ~ range(2) is sequence
t is true ~ n is true ~ z is false ~ false is false ~ not t is true
n is eq 7 ~ n is equalto(7) ~ n is ne 7 ~ n is gt 6 ~ n is lt 6 ~ n is ge 7 ~ n is le 7 ~ n is greaterthan 3 ~ n is lessthan 3
n is sameas 7 ~ none is sameas none ~ t is sameas true ~ 1 is sameas true
'a' is in 'cat' ~ 1 is in [2]
'ABC' is upper ~ 'abc' is lower ~ 'Abc' is upper
range is callable ~ s is callable
'upper' is filter ~ 'nofilter' is filter ~ 'odd' is test
s is nosuchtest
s|nosuchfilter
n is odd is even
not n is odd
n is not odd
'a' is string and 1 is number
1 is string or 2
range(3)
range(1, 4)|list
range(5, 0, -2)|list
range(0)|list
range(1, 2, 0)
range(100001)
range('a')
range(missing)
dict(a=1, b=2)
dict({'a': 1}, b=2)
dict([('x', 1)])
dict(1)
namespace(a=1).a
namespace(a=1).b
namespace(a=1)
namespace({'a': 2}, b=3).b
namespace(_a=1)
raise_exception('my message')
raise_exception('a' ~ 1)
strftime_now('%Y')|length
strftime_now('%%')
s.upper().lower().title()
(s|upper).lower()
[1, 2, 3,]
(1,)
()
{'a': 1,}
[1 2]
(1
1 +
1 ++ 2
foo bar
'unterminated
{{ 1 }}
a.b.
|upper
s|
s is
1 if
[][
$
1 ! 2
a = 1
range(3, *[])
range(*[1, 4])|list
dict(**{'a': 1})
dict(a=1, a=2)
dict(a=1, 2)
range(*5)
dict(**5)
s.upper(1)
s.split(foo=1)
l|join(foo=1)
l|join(',', d=';')
''.join([])
not not 1
(not 1) + 1
1 - -1
1 ~ 2 + 3
1 + 2 ~ 3
'a' ~ 'b' == 'ab'
2 * 3 ~ 4
1, 2
1 | string ~ 'x'
-1 | abs
(-1) | abs
n.__class__
s[0:1][0]
d.items()[0]
(d.items()|list)[0]
(d.items()|list)[0][1]
users[0].x.y
users[0]['x']['y']
users[-1].name
users[0].name[0].lower()
users|length > 2 and users[0].age >= 30
('a', 'b')|join('/')
d.keys()|list|sort
d.values()|sum
d.copy() == d
[1, 2] == [1, 2.0]
(1, 2) == [1, 2]
{'a': 1} == {'a': 1.0}
range(3) == range(0, 3)
'é' < 'z'
d|attr('a')
l is mapping or d is mapping
s|list|length
s|count
'a\x00b'|length
""".strip("\n").split("\n")

TEMPLATES = [
    "{% for x in l %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.depth }};{% endfor %}",
    "{% for x in l %}{{ loop.previtem }}|{{ loop.nextitem }}|{{ loop.previtem is defined }};{% endfor %}",
    "{% for x in l %}{{ loop.cycle('a', 'b') }}{{ loop.changed(x > 1) }}{% endfor %}",
    "{% for x in l %}{{ loop.changed(x > 0) }}{% endfor %}",
    "{% for x in l %}{{ loop.cycle() }}{% endfor %}",
    "{% for x in l %}{{ loop.nosuch }}{{ loop.nosuch is defined }}{% endfor %}",
    "{% for x in l %}{{ loop }}{% endfor %}",
    "{% for x in l if x > 1 %}{{ x }}{{ loop.length }}{{ loop.last }}{{ loop.index }}{% endfor %}",
    "{% for x in l if x > 1 %}{{ loop.last }}{{ loop.length }}{{ loop.nextitem }}{% endfor %}",
    "{% for x in e %}x{% else %}none{% endfor %}|{% for x in l if x > 5 %}x{% else %}none{% endfor %}",
    "{% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %}{{ k is defined }}",
    "{% for k, v in d|dictsort %}{{ k }}={{ v }};{% endfor %}",
    "{% for (a, b), c in [((1, 2), 3)] %}{{ a }}{{ b }}{{ c }}{% endfor %}",
    "{% for a, b in [(1, 2, 3)] %}{% endfor %}",
    "{% for a, b in [(1,)] %}{% endfor %}",
    "{% for a, b in [1] %}{% endfor %}",
    "{% for a, b in ['xy'] %}{{ a }}{{ b }}{% endfor %}",
    "{% for x in 5 %}{% endfor %}",
    "{% for x in missing %}x{% else %}empty{% endfor %}",
    "{% for x in none %}x{% endfor %}",
    "{% for c in u %}[{{ c }}]{% endfor %}",
    "{% for x in d %}{{ x }}{% endfor %}",
    "{% for x in range(5) %}{% if x == 1 %}{% continue %}{% endif %}{% if x == 3 %}{% break %}{% endif %}{{ x }}{% endfor %}",
    "{% for x in range(3) %}{% for y in range(3) %}{% if y == 1 %}{% break %}{% endif %}{{ x }}{{ y }} {% endfor %}{% endfor %}",
    "{% break %}",
    "{% for x in l %}{% macro m() %}{% break %}{% endmacro %}{% endfor %}",
    "{% set x = 1 %}{% for i in l %}{% set x = x + i %}{{ x }} {% endfor %}{{ x }}",
    "{% set ns = namespace(x=0) %}{% for i in l %}{% set ns.x = ns.x + i %}{% endfor %}{{ ns.x }}",
    "{% set d.a = 5 %}",
    "{% set missing.a = 5 %}",
    "{% set ns = namespace() %}{% set ns._x = 1 %}",
    "{% set a, b = 1, 2 %}{{ a }}{{ b }}{% set a, b = b, a %}{{ a }}{{ b }}",
    "{% set a = 1, 2 %}{{ a }}",
    "{% set 1 = 2 %}",
    "{% set true = 2 %}",
    "{% set x %}  body {{ n }} {% endset %}[{{ x }}]",
    "{% set x | upper | trim %}  body {{ n }} {% endset %}[{{ x }}]",
    "{% set x %}{% set y = 1 %}{% endset %}{{ y is defined }}",
    "{% if z %}a{% elif n %}b{% else %}c{% endif %}",
    "{% if z %}a{% elif z %}b{% else %}c{% endif %}{% if z %}x{% endif %}",
    "{% if missing %}a{% else %}b{% endif %}{% if missing is defined and missing.foo %}a{% endif %}",
    "{% if n == 7 %}{% set q = 'set in if' %}{% endif %}{{ q }}",
    "{% macro m(a, b=2, c=a) %}{{ a }}{{ b }}{{ c }}{% endmacro %}{{ m(1) }}|{{ m(1, 3) }}|{{ m(a=5, c=7) }}|{{ m() }}",
    "{% macro m(a) %}{{ a }}{% endmacro %}{{ m(1, 2) }}",
    "{% macro m(a) %}{{ a }}{% endmacro %}{{ m(b=1) }}",
    "{% macro m(a) %}{{ varargs }}{{ kwargs }}{% endmacro %}{{ m(1, 2, 3, x=4) }}",
    "{% macro m(a) %}{{ a.foo }}{% endmacro %}{{ m() }}",
    "{% macro m() %}{{ x }}{% endmacro %}{% set x = 5 %}{{ m() }}",
    "{% macro m() %}{% set y = 1 %}{% endmacro %}{{ m() }}{{ y is defined }}",
    "{% macro f(k) %}{% if k > 0 %}{{ k }}{{ f(k - 1) }}{% endif %}{% endmacro %}{{ f(5) }}",
    "{% macro m() %}[{{ caller() }}]{% endmacro %}{% call m() %}body{{ n }}{% endcall %}",
    "{% macro m() %}[{{ caller(1, b=2) }}]{% endmacro %}{% call(a, b) m() %}{{ a }}{{ b }}{% endcall %}",
    "{% macro m() %}{{ caller is defined }}{% endmacro %}{{ m() }}",
    "{% macro m() %}x{% endmacro %}{% call m() %}y{% endcall %}",
    "{% macro m() %}  a  {% endmacro %}[{{ m()|trim }}]{{ m().strip()|length }}",
    "{% filter upper %}abc {{ s }}{% endfilter %}",
    "{% filter replace('a', 'b')|upper %}aXa{% endfilter %}",
    "{% with a = 1, b = n %}{{ a }}{{ b }}{% set c = 3 %}{% endwith %}{{ a is defined }}{{ c is defined }}",
    "{% with %}{{ n }}{% endwith %}",
    "{% print n, s %}",
    "{% raw %}{{ x }} {% if %}{% endraw %}|{%- raw -%}  a  {%- endraw -%}  b",
    "a {# comment {{ x }} #} b\n  {# line #}\nc",
    "a\n  {% if true %}\n  b\n  {% endif %}\nc\n",
    "a\n  {%- if true -%}\n  b\n  {%- endif -%}\nc\n",
    "a\n  {%+ if true +%}\n  b\n  {%+ endif %}\nc\n\n",
    "  {{- n -}}  x  {{ n }}\n\n y",
    "{{- -n }}|{{ -n -}} |",
    "a\r\nb\rc\n",
    "{% if true %}\n\n  x{% endif %}\n\n  y",
    "text   {#- c -#}   text\n   {#+ c +#}\nx",
    "x {% for i in l -%} {{ i }} {%- endfor %} y",
    "{% for i in l recursive %}{{ i }}{% endfor %}",
    "{% for i in [{'v': 1, 'c': [{'v': 2, 'c': []}, {'v': 3}]}] recursive %}{{ i.v }}@{{ loop.depth }}{% if i.c %}({{ loop(i.c) }}){% endif %}{% endfor %}",
    "{% for i in l %}{{ loop(l) }}{% endfor %}",
    "{% set g = users|selectattr('on') %}{{ g|list|length }}{{ g|list|length }}",
    "{% set g = users|map(attribute='name') %}{% for x in g %}{{ x }}{{ loop.last }}{{ loop.length }}{% endfor %}{% for x in g %}again{% endfor %}",
    "{% set ns = namespace(stop=false) %}{% for x in l if not ns.stop %}{{ x }}{% set ns.stop = true %}{% endfor %}",
    "{% set j = joiner('|') %}{% for x in l %}{{ j() }}{{ x }}{% endfor %}",
    "{% set ns = namespace(a=1) %}{{ ns.a }}{{ ns['a'] }}{{ ns.b is defined }}{{ ns }}",
    "{% set ns = namespace(l=[]) %}{% for x in l %}{% set ns.l = ns.l + [x * 2] %}{% endfor %}{{ ns.l }}",
    "{% generation %}a{{ n }}{% endgeneration %}b{% for x in l %}{% generation %}{{ x }}{% endgeneration %}{% endfor %}",
    "{% generation %}{% set y = 1 %}{% endgeneration %}{{ y is defined }}",
    "{% block b %}in block {{ n }}{% endblock %}{% block c %}x{% endblock c %}",
    "{% if true %}",
    "{% endif %}",
    "{% for x in l %}{% endif %}",
    "{% for x %}{% endfor %}",
    "{% for loop in l %}{% endfor %}",
    "{% for x in l %}{% else %}{% else %}{% endfor %}",
    "{% nosuch %}",
    "{% %}",
    "{{ }}",
    "{{ 1",
    "{% if 1 ",
    "{# open",
    "{% raw %}open",
    "{% include 'x' %}",
    "{% extends 'x' %}",
    "{% import 'x' as y %}",
    "{% macro m(a=1, b) %}{% endmacro %}",
    "{% macro 1() %}{% endmacro %}",
    "{% call n %}{% endcall %}",
    "{% set %}",
    "{% if z %}{{ s|nosuch }}{% endif %}ok",
    "{% if t %}{{ s|nosuch }}{% endif %}",
    "{% if z %}{{ s is nosuch }}{% endif %}ok",
    "{{ '}}' }}{{ '%}' }}{{ {'a': {'b': 1}} }}{{ '{%' }}",
    "{{ '#}' }}{# }} #}{{ \"a\\\"b\" }}",
    "{ {x} {{'{'}} } % #",
    "{{ n }}\n",
    "{{ n }}\n\n",
    "\n{{ n }}",
    "",
    "{%- for m in users -%}\n  {%- if loop.first -%} FIRST {%- endif %}\n{{ m.name }}\n{%- endfor -%}\n",
    "{% for m in users %}{% if not loop.last %}{{ m.name }}, {% else %}{{ m.name }}{% endif %}{% endfor %}",
    "{% for m in users %}{% set outer = loop %}{% for c in m.name %}{{ outer.index }}{{ loop.index }}{% endfor %}{% endfor %}",
    "{% set loop_messages = users[1:] %}{% for m in loop_messages[::-1] %}{{ m.name }}{% endfor %}",
    "{% set x = 'a' %}{% set x = x ~ 'b' %}{{ x }}{% set x %}{{ x }}c{% endset %}{{ x }}",
    "{{ range }}"[:0],
    "{% set s2 = s %}{{ s2 }}{{ self is defined }}"[:24],
    "{{ caller }}{{ varargs }}{{ loop }}",
    "{% if users is iterable and users is not string and users is not mapping %}list{% endif %}",
    "{% set content = ' <think>a</think>b ' %}{{ content.split('</think>')[-1].lstrip('\\n') }}{{ content.split('</think>')[0].split('<think>')[-1] }}",
    "{{ 'x' if n > 5 and not z else 'y' }}{{ ('a' if z else 'b') ~ 'c' }}",
    "{%- set a = {'x': [1, {'y': 'z'}]} -%}{{ a.x[1].y }}{{ a['x'][0] }}{{ a.x[1]['y']|upper }}",
]
