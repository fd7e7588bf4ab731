"""The vocabularies of the skills: common short words, names, cities and companies."""


def listed(text: str) -> tuple[str, ...]:
    """The words of a text, in order."""
    return tuple(text.split())


WORDS = listed("""
    apple arm army art baby back ball band bank base bath bear bed bell bird boat body bone book bowl box boy bread
    bridge bus cake call camp car card cat chair city class clay clock cloud coat code coin cold cook corn cost cow
    cup day deal deer desk dish dog door dress drum duck dust ear earth east edge egg engine eye face fact farm fire
    fish flag floor flower food foot forest fork fox friend frog fruit game garden gate gift girl glass goat gold grass
    green hair hall hand hat head heart hill home honey hope horse house ice idea island jar job juice jump key king
    kitchen knife lake lamp land leaf leg lemon letter light line lion list lock love lunch map mark market meal meat
    metal milk mind mirror money moon morning mother mouse mouth movie music nail name neck nest night nose note
    nurse oak ocean office oil onion orange oven page paint paper park party path pen pencil piano pig pilot plane
    plant plate pocket poem pool price queen quiet rabbit radio rain rice ring river road rock roof room root rope
    rose salt sand school sea seat seed sheep ship shirt shoe shop silver sister sky sleep snow soap song soup
    spoon sport spring star stone storm story street sugar summer sun table tail tea team tent test tiger time tooth
    town toy train tree truck uncle unit valley village voice wall war watch water wave week west wheel wind window
    wing winter wood wool work yard year youth zero zone
    """)

PIG_WORDS = listed("""
    apple bear bird book bread bridge cake car cat chair clock cloud dog door egg fish flag frog garden glass goat
    green hand hat horse house ice king lake lamp leaf lion map milk moon nest ocean orange pen pig queen rain ring
    river ship snow star stone sun table tree water wind wolf
    """)

FIRST_NAMES = listed("""
    Adam Alan Alex Alice Amy Anna Ben Carl Clara Dan David Diana Emma Eric Eva Frank Fred George Grace Harry Helen
    Henry Ian Jack James Jane John Julia Karl Kate Kevin Laura Leo Linda Lisa Lucy Mark Martin Mary Max Nick Nina
    Oscar Paul Peter Rachel Robert Rose Ruth Sam Sara Simon Steve Susan Tom Tony Victor William
    """)

LAST_NAMES = listed("""
    Adams Allen Baker Bell Brown Carter Clark Cook Davis Evans Fisher Fox Gray Green Hall Harris Hill Hunt Jones
    Kelly King Lee Lewis Long Martin Miller Moore Nelson Parker Reed Scott Smith Stone Taylor Turner Walker Ward
    West White Wilson Wood Young
    """)

CITIES = listed("""
    Athens Berlin Boston Cairo Chicago Dallas Denver Dublin Geneva Houston Lima London Madrid Miami Milan Moscow
    Munich Oslo Paris Prague Rome Seattle Sydney Tokyo Toronto Vienna
    """)

COMPANIES = listed(
    "Alpha Apex Atlas Beacon Bright Delta Eagle Falcon Global Harbor Metro Nova Orion Pioneer Summit Union"
)

MONTHS = listed("January February March April May June July August September October November December")
