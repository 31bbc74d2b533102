"""Word lists for the chat tasks."""

WORDS = tuple(
    """apple river stone cloud paper green table light music bread horse tiger night chair ocean garden window bridge
    silver yellow orange winter summer spring forest planet rocket castle dragon button pocket mirror candle ladder
    basket hammer pencil doctor farmer sailor singer writer island desert valley meadow coffee sugar butter cheese
    lemon cherry onion pepper tomato potato carrot salad dinner supper lunch morning evening autumn thunder rain snow
    wind storm fire water earth metal glass wood gold iron copper north south east west red blue black white cat dog
    bird fish mouse sheep goat duck lion bear wolf fox deer frog ship boat train plane car truck road street city
    town village house door wall roof floor room bed desk lamp clock book page word letter story song game ball
    drum bell ring key lock coin box bag cup plate spoon fork knife shirt shoe hat coat glove sock""".split()
)
FUNCTIONS = tuple(
    """add join area total combine merge mix scale shift apply score rate value cost price speed ratio result compute
    calculate update blend measure level amount change delta gain weight""".split()
)
OPERATIONS = (
    ("plus", "+"),
    ("minus", "-"),
    ("times", "*"),
    ("divided by", "/"),
    ("modulo", "%"),
    ("to the power of", "**"),
)
VARIABLES = tuple("a b c d h i j k m n p q r s t u v w x y z".split())
CITIES = tuple(
    """Paris London Berlin Madrid Rome Vienna Lisbon Dublin Oslo Helsinki Stockholm Copenhagen Warsaw Prague Budapest
    Athens Cairo Nairobi Lagos Tunis Tokyo Kyoto Seoul Beijing Shanghai Delhi Mumbai Bangkok Hanoi Jakarta Sydney
    Melbourne Perth Auckland Toronto Montreal Vancouver Chicago Boston Denver Seattle Houston Miami Lima Quito Bogota
    Santiago Havana Geneva Zurich Milan Naples Lyon Porto Seville Hamburg Munich Cologne Krakow Riga""".split()
)
PEOPLE = tuple(
    """Anna Ben Clara David Emma Felix Grace Henry Iris Jack Karen Leo Maria Noah Olivia Paul Rosa Simon Tina Victor
    Walter Yara Zoe Adam Bella Chris Diana Eric Fiona George""".split()
)
SKIES = ("sunny", "cloudy", "rainy", "windy", "foggy", "snowy")
