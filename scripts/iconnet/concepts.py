"""Which names stand for which concept: the written list, made by looking at contact sheets.

A line is a concept: its name as people say it, then the names that icon sets have for it. Names on one line are
synonyms or differ in little (pen and pencil, headset and headphones). Left out are pure directions (arrow-left,
chevron-up), mirror images and pairs that turn one into the other (undo and redo, thumbs down, download and upload),
geometric shapes, letters and brands, words that different sets draw as different things (diamond, table, football,
share), and concepts that stand in fewer than five sets.

`GROUPS` are concepts whose drawings or names share a part: they stay on one side of the split.
"""

from __future__ import annotations

from benchmarks.files import unit_hash

_CONCEPTS = """
accessibility: accessibility accessible wheelchair disabled
airplane: airplane plane flight
alarm clock: alarm alarm-clock clock-alarm
ambulance: ambulance
anchor: anchor anchor-simple
archive box: archive archive-box
armchair: armchair chair
at sign: at at-symbol alternate-email at-sign mention
atom: atom
axe: axe
backpack: backpack bag-personal
balloon: balloon
bandage: bandage band-aid bandaid healing
bank: bank account-balance building-bank building-library landmark
barcode: barcode
baseball: baseball ball-baseball sports-baseball
basket: basket shopping-basket
basketball: basketball ball-basketball sports-basketball
bathtub: bath bathtub
battery: battery battery-full battery-empty battery-low battery-high battery-medium battery-half \
    battery-charging
bed: bed bed-double bed-flat king-bed bed-king
beer: beer beer-stein beer-bottle
bell: bell notification notifications bell-ringing
bicycle: bicycle bike pedal-bike directions-bike
binoculars: binoculars
bitcoin: bitcoin currency-bitcoin
bluetooth: bluetooth
boat: boat ship directions-boat sailboat sailing ferry speedboat
bold text: bold text-bold format-bold type-bold text-b
bomb: bomb
bone: bone
book: book book-open open-book menu-book book-open-text book-2 book-open-variant
bookmark: bookmark bookmarks
brain: brain
bread: bread bread-slice bakery-dining
briefcase: briefcase work briefcase-2
broom: broom mop
brush: brush paint-brush paintbrush paint-brush-broad
bug: bug bug-report ladybug
building: building buildings office-building business apartment building-office city
bus: bus directions-bus bus-front
cake: cake birthday-cake cake-slice food-cake
calculator: calculator calculate
calendar: calendar calendar-blank calendar-today calendar-month calendar-days event
camera: camera photo-camera
candle: candle candles
car: car directions-car car-front vehicle-car
carrot: carrot food-carrot
cash: cash money banknote payments cash-banknote banknotes
cast: cast airplay screencast
castle: castle castle-turret building-castle fort
cat: cat
certificate: certificate
chart bars: chart-bar bar-chart chart-bar-big chart-column chart bar-chart-line data-bar-vertical
chart line: chart-line line-chart show-chart data-line chart-line-up stats-up-square graph-up
chart pie: chart-pie pie-chart chart-donut data-pie
chef hat: chef-hat
chip: cpu chip memory microchip developer-board cpu-bolt cpu-chip
church: church building-church
cigarette: cigarette smoking smoking-rooms
clapperboard: clapperboard movie film-slate movies-and-tv movie-open
clipboard: clipboard clipboard-text assignment clipboard-list clipboard-document clipboard-data
clock: clock schedule access-time clock-circle time clock-time-four
cloud lightning: cloud-lightning thunderstorm weather-thunderstorm cloud-bolt cloud-storm
cloud rain: cloud-rain rainy weather-rainy cloud-drizzle rain rainy-light
cloud snow: cloud-snow weather-snowy weather-snow cloud-snowfall
cloud: cloud clouds
clover: clover
cocktail: glass-cocktail martini local-bar wineglass-triangle drink-margarita
code: code code-tags code-simple
coffee cup: coffee cup cup-hot coffee-cup local-cafe cafe drink-coffee tea-cup mug teacup
coin: coin coins
command: command keyboard-command-key apple-keyboard-command
compass: compass explore
contrast: contrast circle-half-full
cookie: cookie
copy: copy content-copy file-copy
copyright: copyright
credit card: credit-card payment-card
crop: crop
crown: crown
cursor: cursor mouse-pointer cursor-default pointer arrow-selector-tool
database: database
desk: desk
dice: dice dice-five dice-5 dice-3 dice-six dice-6 dice-one casino dice-four dice-multiple
disc: disc vinyl album cd compact-disc vinyl-record
dna: dna genetics
dog: dog
dollar: currency-dollar dollar attach-money dollar-sign
door: door door-open door-front meeting-room
drone: drone
droplet: drop droplet water-drop waterdrop
dumbbell: dumbbell barbell fitness-center dumbbells gym
ear: ear hearing
egg: egg
elevator: elevator
envelope: mail envelope email envelope-simple letter
equalizer: equalizer sliders adjustments tune sliders-horizontal adjustments-horizontal options slider
eraser: eraser ink-eraser
euro: currency-euro euro
eye: eye visibility view
eyedropper: eyedropper pipette color-picker dropper colorize eye-dropper
face mask: face-mask
factory: factory building-factory
fan: fan mode-fan
feather: feather
file: file document page description paper
film strip: film film-strip filmstrip
fingerprint: fingerprint fingerprint-pattern finger-print
fire extinguisher: fire-extinguisher
fire: fire flame local-fire-department
fish: fish
flag: flag
flashlight: flashlight
flask: flask beaker science experiment flask-conical
floppy disk: save device-floppy floppy-disk floppy diskette content-save
flower: flower flower-tulip local-florist flower-lotus
folder: folder
footprints: footprints shoe-print footprint
fork and knife: restaurant fork-knife utensils silverware-fork-knife tools-kitchen-2 cutlery silverware
fridge: fridge refrigerator kitchen
funnel: filter funnel filter-alt
gamepad: gamepad game-controller device-gamepad controller sports-esports videogame-asset xbox-controller
garage: garage
gas pump: gas-station gas-pump local-gas-station fuel fuel-pump
gauge: gauge speedometer speed speedometer-medium
gavel: gavel
gear: gear settings cog
ghost: ghost
gift: gift
git branch: git-branch source-branch branch
git commit: git-commit source-commit commit
git merge: git-merge source-merge
git pull request: git-pull-request source-pull
glasses: glasses eyeglasses sunglasses
globe: globe world public earth globe-alt global
golf: golf golf-course sports-golf
graduation cap: mortarboard graduation-cap academic-cap hat-graduation
hammer: hammer
hand: hand hand-palm hand-raised hand-stop back-hand front-hand hand-back-right
handbag: handbag purse
handshake: handshake
hard drive: hard-drive hard-drives harddisk device-hdd hard-disk
hash: hash hashtag pound
headphones: headphones headset headphone headset-help headphones-round
heart: heart favorite
heartbeat: heartbeat heart-pulse activity pulse monitor-heart
helicopter: helicopter
helmet: helmet hard-hat
hospital: hospital local-hospital building-hospital
hourglass: hourglass hourglass-empty
house: house home home-simple
ice cream: ice-cream icecream
id card: id-card identification id identification-card contact-card id-badge
image: image photo gallery
inbox: inbox
incognito: incognito spy detective
infinity: infinity all-inclusive
info: info information info-circle information-circle
italic text: italic text-italic format-italic type-italic
joystick: joystick
key: key vpn-key
keyboard: keyboard
ladder: ladder
lamp: lamp desk-lamp table-lamp lamp-desk floor-lamp
laptop: laptop laptop-chromebook laptop-mac
lasso: lasso lasso-select
layers: layers stack
leaf: leaf eco
lifebuoy: lifebuoy life-buoy help-buoy lifesaver
light bulb: lightbulb bulb light-bulb
lightning: bolt lightning flash zap lightning-charge
link: link
list: list list-ul format-list-bulleted list-bulleted text-bullet-list list-bullet
location pin: map-pin location-on location map-marker geo-alt map-point location-pin
lock: lock
luggage: luggage suitcase bag-suitcase suitcase-rolling
magic wand: wand magic-wand auto-fix magic wand-sparkles
magnet: magnet
magnifier: search magnifying-glass magnify magnifier
mailbox: mailbox
map: map
medal: medal award military-tech medal-ribbon
megaphone: megaphone campaign bullhorn
menu: menu hamburger-menu
microphone: microphone mic
microscope: microscope biotech
microwave: microwave microwave-oven
monitor: monitor desktop desktop-windows display computer pc-display device-desktop computer-desktop
moon: moon dark-mode
mosque: mosque building-mosque
motorcycle: motorcycle two-wheeler motorbike
mountain: mountain mountains landscape terrain image-filter-hdr
mouse: mouse
music note: music-note music music-notes musical-note music-note-beamed
newspaper: newspaper news
nfc: nfc
notebook: notebook journal
omega: omega
package: package box package-variant box-seam
paint bucket: paint-bucket bucket format-color-fill color-fill
paint roller: paint-roller
palette: palette color-palette
paper plane: send paper-plane paper-airplane paper-plane-tilt
paperclip: paperclip attach attachment attach-file paper-clip
paragraph: paragraph pilcrow format-paragraph
parking: parking local-parking parking-circle
passport: passport
pause: pause
paw: paw pets paw-print
pencil: pen edit pencil create
people: users people group
percent: percent percentage
person: user person account profile
phone handset: phone call telephone
piano: piano piano-keys
piggy bank: piggy-bank savings pig-money
pill: pill medication capsule pills
pizza: pizza local-pizza pizza-slice
planet: planet
plant: plant potted-plant seedling sprout
play: play play-arrow
plug: plug power-plug
podcast: podcast podcasts
pound sterling: currency-pound pound-sterling currency-gbp
power: power power-settings-new power-off
printer: printer print
projector: projector
puzzle: puzzle puzzle-piece extension
qr code: qr-code qrcode
question mark: question help question-mark help-circle question-circle question-mark-circle
quote: quote format-quote quotes text-quote format-quote-close blockquote
radar: radar
radio: radio
rainbow: rainbow looks
receipt: receipt receipt-long
recycle: recycle recycling
road: road
robot: robot bot smart-toy
rocket: rocket rocket-launch
router: router
rss: rss rss-feed
ruler: ruler straighten
rupee: currency-rupee indian-rupee currency-inr rupee
satellite: satellite satellite-alt satellite-variant
scale: scale balance scales scale-balance
scissors: scissors cut content-cut
scooter: scooter moped electric-scooter
server: server
shield: shield
shirt: shirt t-shirt tshirt-crew
shopping bag: shopping-bag bag local-mall
shopping cart: cart shopping-cart
shovel: shovel
shower: shower shower-head
shuffle: shuffle
signpost: signpost sign-post
sim card: sim-card sim
skateboard: skateboard
skull: skull
smile: smile mood-smile emoji-smile smiley sentiment-satisfied happy emoji face-smile emoticon-happy \
    smile-circle
snowflake: snowflake ac-unit
soccer ball: soccer soccer-ball ball-football sports-soccer
sofa: sofa couch weekend
solar panel: solar-panel solar-power
spade: spade cards-spade suit-spade
sparkles: sparkles sparkle creation
speaker box: speaker
speech bubble: chat message comment message-circle chat-bubble chat-circle chat-bubble-left chat-round \
    chat-square
star: star
stethoscope: stethoscope
stop: stop
stopwatch: stopwatch timer
store: store shop storefront building-store
sun: sun sunny light-mode brightness-high
sunrise: sunrise weather-sunset-up wb-twilight
sword: sword swords
syringe: syringe vaccine vaccines needle
tablet: tablet device-tablet
tag: tag label sell tags pricetag
target: target bullseye
taxi: taxi local-taxi
telescope: telescope
tennis: tennis tennis-ball ball-tennis
tent: tent camping
terminal: terminal
test tube: test-tube
thermometer: thermometer device-thermostat
thumb up: thumbs-up thumb-up hand-thumbs-up hand-thumb-up like
ticket: ticket confirmation-number ticket-confirmation
toggle: toggle toggle-left toggle-right toggle-off toggle-on toggle-switch
tornado: tornado weather-tornado
tractor: tractor agriculture
traffic cone: traffic-cone cone
traffic light: traffic-light traffic-lights traffic stoplights
train: train tram subway
translate: translate
trash can: trash delete bin trash-can trash-bin-trash
tree: tree park tree-evergreen tree-deciduous
trending up: trending-up
trophy: trophy
truck: truck local-shipping delivery-truck vehicle-truck
tv: tv television
typography: font text-font typography type text-size format-size
umbrella: umbrella beach-access
underline text: underline text-underline format-underlined format-underline type-underline
usb: usb
video camera: video videocam video-camera camera-video
virus: virus coronavirus
voicemail: voicemail
volume: volume volume-up volume-high speaker-high volume-loud speaker-wave volume-2
wallet: wallet account-balance-wallet
warning: warning alert-triangle exclamation-triangle danger-triangle triangle-alert
washing machine: washing-machine local-laundry-service washer
watch: watch smartwatch watch-variant
webcam: webcam
webhook: webhook
wifi: wifi
wind: wind air windy weather-windy
wine glass: wine glass-wine wine-bar drink-wine
wrench: wrench build tool
yen: currency-yen yen japanese-yen
"""

# Names that a set gives to something else: its "filter" are three lines, its "cup" is a trophy.
_EXCEPT = """
bi:event bi:filter bi:phone bi:save bi:server bx:box bx:candle bx:chart bx:filter bx:joystick bx:map
carbon:anchor carbon:box carbon:delete carbon:equalizer carbon:event carbon:key carbon:package carbon:road
carbon:scale carbon:tennis carbon:warning fluent:filter fluent:group fluent:speaker heroicons:command
iconoir:movie iconoir:pound iconoir:warning ion:filter ion:radio ion:scale ion:server lucide:group
lucide:pointer lucide:radio material-symbols:camera material-symbols:filter material-symbols:satellite
material-symbols:scale material-symbols:shop material-symbols:stack material-symbols:tag mdi:bolt mdi:box
mdi:contrast mdi:cup mdi:equalizer mdi:group mdi:moon mdi:satellite mdi:spade mingcute:movie mingcute:park
mingcute:scale mingcute:stack mingcute:video ph:speaker ph:video solar:album solar:cup solar:dropper
solar:help solar:plane solar:scale solar:send solar:traffic tabler:movie tabler:percentage
"""

GROUPS = (
    ("airplane", "paper plane"),
    ("alarm clock", "clock", "stopwatch"),
    ("basket", "handbag", "shopping bag", "shopping cart"),
    ("battery", "plug", "lightning"),
    ("bold text", "italic text", "underline text", "typography", "paragraph"),
    ("book", "bookmark", "notebook", "newspaper", "file", "clipboard", "receipt"),
    ("building", "bank", "factory", "hospital", "house", "store", "church", "mosque"),
    ("camera", "video camera", "webcam"),
    ("chart bars", "chart line", "chart pie", "trending up"),
    ("cloud", "cloud rain", "cloud snow", "cloud lightning"),
    ("cash", "coin", "bitcoin", "dollar", "euro", "pound sterling", "rupee", "yen", "wallet"),
    ("credit card", "id card", "sim card", "passport"),
    ("envelope", "inbox", "mailbox"),
    ("flask", "test tube"),
    ("git branch", "git commit", "git merge", "git pull request"),
    ("hammer", "gavel"),
    ("heart", "heartbeat"),
    ("brush", "paint bucket", "paint roller", "palette"),
    ("barcode", "qr code"),
    ("map", "location pin", "globe"),
    ("monitor", "laptop", "tablet", "tv"),
    ("person", "people", "accessibility"),
    ("play", "pause", "stop"),
    ("star", "sparkles"),
    ("sun", "sunrise"),
    ("virus", "bug"),
    ("wine glass", "cocktail", "beer"),
    ("database", "server", "hard drive"),
    ("headphones", "microphone", "volume", "speaker box"),
    ("package", "archive box"),
    ("wifi", "router", "cast"),
)


def other_meanings() -> set[tuple[str, str]]:
    """Set and name where a name of a concept stands for something else in that set."""
    return {(set_name, name) for set_name, name in (entry.split(":") for entry in _EXCEPT.split())}


def load() -> dict[str, tuple[str, ...]]:
    """The names that icon sets have for each concept, by concept."""
    lines = _CONCEPTS.replace("\\\n", "").strip().splitlines()
    pairs = (line.split(": ") for line in lines)
    return {concept: tuple(names.split()) for concept, names in pairs}


def group_of(concept: str) -> str:
    """The name of a concept's group: its first member, or the concept itself."""
    return next((group[0] for group in GROUPS if concept in group), concept)


def held_out(concepts: list[str], share: float) -> list[str]:
    """Draws whole groups until at least `share` of the concepts are held out; in the order of `concepts`."""
    groups: dict[str, list[str]] = {}
    for concept in concepts:
        groups.setdefault(group_of(concept), []).append(concept)
    chosen: set[str] = set()
    for group in sorted(groups, key=lambda name: unit_hash("held-out", name)):
        if len(chosen) < share * len(concepts):
            chosen |= set(groups[group])
    return [concept for concept in concepts if concept in chosen]
