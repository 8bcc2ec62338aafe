"""Texts of the default calibration set, written for it: about 3,500 tokens of the kinds that models read and write."""

__all__ = ["QUESTIONS", "TEXTS"]

QUESTIONS = (
    "Describe this image in one sentence.",
    "How many shapes are there, and which colours do they have?",
    "Read the bars of this chart from left to right.",
    "What is in the upper left corner?",
)

TEXTS = (
    """The valley had been a lake once. Every spring the farmers still turned up flat grey stones with the ribs of fish
printed on them, and the children carried these home in their pockets until the lining tore. Marta kept hers on the
window sill, in order of size, and told visitors that the smallest was the oldest, which was not true but could not be
disproved. "You should write that down," said her uncle, who wrote everything down. He had a notebook for the weather,
one for the price of seed, and one, bound in red, that nobody was allowed to open. After he died they found that it held
nothing but the names of people he had met, with a single word beside each. Beside Marta's name the word was "later".
She thought about it for years. In the end she decided that it had been a reminder, not a judgement: he had meant to
think of something, and the evening had been warm, and the dog had wanted to go out. That winter the snow came early. It
lay on the roofs like folded linen, and the road to the station disappeared, so that the post was brought by a man on
skis who sang as he came down the hill, badly, in a language that none of them could place.""",
    """# Installing the gateway

The gateway forwards measurements from the field bus to the storage service. It needs Linux 5.10 or newer, 200 MB of
memory and a user that may open serial ports.

1. Download the archive and check its signature with `gpg --verify gateway.tar.gz.sig`.
2. Unpack it below `/opt`, and copy `gateway.example.toml` to `/etc/gateway.toml`.
3. Set `port`, `baud_rate` and `endpoint`. All other keys have defaults; `gateway --help-config` prints them.
4. Start the service: `systemctl enable --now gateway`.

| key | type | default | meaning |
|-----|------|---------|---------|
| `port` | string | none | path of the serial device, such as `/dev/ttyUSB0` |
| `baud_rate` | integer | 19200 | symbols per second; both ends must agree |
| `retry.max_attempts` | integer | 5 | after which a measurement is written to the dead-letter file |
| `tls.verify` | boolean | true | set it to false for tests only |

If the log shows `checksum mismatch (expected 0x3F, got 0xBF)`, the highest bit of each byte is lost: the device sends
eight data bits and the driver expects seven. If it shows `connection refused`, the endpoint is not reachable from this
host; try `curl -v` with the same address. Upgrades keep the configuration, but read the release notes first, since
version 3 renamed `timeout` to `timeout_ms` and no longer accepts floating-point values there.""",
    '''import heapq
from collections import defaultdict


class Graph:
    """A directed graph with non-negative edge weights."""

    def __init__(self, edges=()):
        self._successors = defaultdict(list)
        for source, target, weight in edges:
            self.add_edge(source, target, weight)

    def add_edge(self, source, target, weight=1.0):
        if weight < 0:
            raise ValueError(f"weight must not be negative, got {weight}")
        self._successors[source].append((target, weight))

    def shortest_paths(self, start):
        """Distances from ``start`` to every node that can be reached."""
        distances = {start: 0.0}
        queue = [(0.0, start)]
        while queue:
            distance, node = heapq.heappop(queue)
            if distance > distances[node]:
                continue  # a shorter way was found since this entry was pushed
            for successor, weight in self._successors[node]:
                candidate = distance + weight
                if candidate < distances.get(successor, float("inf")):
                    distances[successor] = candidate
                    heapq.heappush(queue, (candidate, successor))
        return distances


if __name__ == "__main__":
    graph = Graph([("a", "b", 4), ("a", "c", 1), ("c", "b", 2), ("b", "d", 5)])
    assert graph.shortest_paths("a") == {"a": 0.0, "c": 1.0, "b": 3.0, "d": 8.0}

static int compare(const void *left, const void *right)
{
    const struct entry *a = left, *b = right;
    if (a->key != b->key)
        return a->key < b->key ? -1 : 1;
    return strcmp(a->name, b->name);
}

SELECT c.name, COUNT(*) AS orders, SUM(o.total) AS revenue
FROM customers AS c JOIN orders AS o ON o.customer_id = c.id
WHERE o.created_at >= '2024-01-01' GROUP BY c.name HAVING COUNT(*) > 3 ORDER BY revenue DESC LIMIT 10;''',
    """A prism splits white light because the speed of light in glass depends on the wavelength: violet is slowed more
than red, and bends further. Newton showed in 1672 that a second prism could join the colours into white again, so the
glass does not add anything to the light; it only sorts it. The angle of deviation is smallest when the ray passes
symmetrically. For an apex angle A and an index n, sin((A + D) / 2) = n sin(A / 2). With A = 60 degrees and n = 1.52 the
minimum D is 38.9 degrees.

Question: A train leaves at 9:40 and travels 252 km at an average of 84 km/h. It waits for 15 minutes on the way. When
does it arrive?
Answer: 252 / 84 = 3 hours of travel. 9:40 plus 3 hours is 12:40, plus 15 minutes is 12:55. It arrives at 12:55.

Question: What is the sum of the first n odd numbers?
Answer: 1 + 3 + 5 + ... + (2n - 1) = n^2. Proof by induction: for n = 1 both sides are 1. If the sum of the first n is
n^2, then adding 2n + 1 gives n^2 + 2n + 1 = (n + 1)^2.

Question: Solve 3x^2 - 12x + 9 = 0.
Answer: Divide by 3: x^2 - 4x + 3 = 0, so (x - 1)(x - 3) = 0. The solutions are x = 1 and x = 3.

Cells store energy in adenosine triphosphate. Enzymes lower the barrier of a reaction without being used up; inhibitors
occupy the active site, or change its shape from elsewhere. The rate follows v = Vmax [S] / (Km + [S]), so that at a
concentration of Km it is half of its maximum.""",
    """{"id": 48213, "status": "shipped", "customer": {"name": "A. Lindqvist", "email": "a.lindqvist@example.org"},
 "items": [{"sku": "LMP-0042", "title": "Desk lamp, brass", "quantity": 1, "price": 79.90},
           {"sku": "BLB-E27-8W", "title": "LED bulb 8 W, 2700 K", "quantity": 4, "price": 3.25}],
 "total": 92.90, "currency": "EUR", "notes": null, "tags": ["gift", "express"]}

<table class="report"><tr><th>Month</th><th>Visits</th></tr><tr><td>May</td><td>12,408</td></tr></table>

2024-03-18T07:12:55Z INFO  worker[3] picked job 9f2c (queue=thumbnails, waited 41 ms)
2024-03-18T07:12:56Z WARN  worker[3] image 9f2c/17.jpg has no colour profile, assuming sRGB
2024-03-18T07:12:58Z ERROR worker[1] job 77ab failed: OSError: [Errno 28] No space left on device

diff --git a/units.py b/units.py
@@ -12,7 +12,7 @@ def to_celsius(kelvin):
-    return kelvin - 273
+    return kelvin - 273.15

Permission is granted to use, copy and change this file for any purpose, provided that this notice is kept. The file is
provided "as is", without warranty of any kind, express or implied, including but not limited to fitness for a
particular purpose. In no event shall the authors be liable for any claim or damages arising from its use.

Dear Ms Okafor, thank you for your application of 4 June. We were impressed by your work on coastal erosion and would
like to invite you to an interview on Thursday, 20 June, at 10:30 in our office at 14 Harbour Street. Please bring
copies of your certificates. If the date does not suit you, call me on extension 217. Yours sincerely, P. Brandt""",
    """Der Zug nach Freiburg hat heute zwölf Minuten Verspätung, weil die Weiche am Südbahnhof gefroren war. Wer
umsteigen muss, wartet bitte am Gleis gegenüber; der Anschluss wird erreicht.

Le marché ouvre à sept heures. On y trouve des tomates, du fromage de chèvre et, quand la pêche a été bonne, des
sardines que l'on fait griller sur place. Les enfants regardent les marchands et goûtent à tout.

La biblioteca cierra a las nueve de la noche. Si necesita un libro que no está en la sala, pídalo en el mostrador; suele
llegar en dos o tres días, y puede renovar el préstamo por teléfono.

今天下午我们去了河边的公园。天气很好，湖面上有许多小船，孩子们在草地上放风筝。回家的路上，妈妈买了一个西瓜，晚饭以后大家一起吃。

図書館は駅から歩いて五分のところにあります。月曜日は休みですが、土曜日は夜八時まで開いています。

Сегодня утром шёл снег, и дворники расчищали дорожки перед школой. К полудню выглянуло солнце, и дети лепили снеговика.

오늘은 비가 와서 소풍을 가지 못했다. 대신 집에서 만두를 만들고 오래된 영화를 보았다.""",
    """User: I want to bake bread without a scale. Is that possible?
Assistant: Yes. Use a cup of about 240 ml and spoon the flour in loosely. For one loaf you need:

- 3 cups of flour
- 1 1/4 cups of lukewarm water
- 1 1/2 teaspoons of salt
- 2 teaspoons of dry yeast

Mix everything, knead for ten minutes, and let it rise until it has doubled, which takes about an hour in a warm
kitchen. Shape it, let it rest for 30 minutes, then bake it at 220 °C for 35 minutes. It is done when it sounds hollow.

User: My dough is very sticky. What should I change?
Assistant: Sticky dough is usually right: it becomes smoother while you knead. If it still clings to your hands after
eight minutes, add flour by the tablespoon. Wet hands help more than floury ones.

User: Write a short summary of the plot of a detective story, please.
Assistant: A violin disappears on the night before a concert. The cleaner saw nobody, the case is locked, and the rain
has washed the footprints away. Inspector Hale notices that the case weighs too little when she lifts it, yet the
insurer's photograph shows it closed. The instrument never left the hall: its owner, who could not face the audience,
had hung it among the props of last year's opera, where nobody would look for something real.

Yesterday's match ended 3-1. The visitors led until the 67th minute, when two changes turned the game. "We stopped
running after the ball," the captain said, "and let it come to us." The club is now fourth, five points behind the
leaders, and plays away on Sunday. Tickets cost between 18 and 45 euros; children under six enter free of charge.""",
)
