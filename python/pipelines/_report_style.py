"""Style and script of the report."""

STYLE = """
:root{--bg:#f7f7f9;--card:#fff;--text:#1c1d22;--soft:#646876;--line:#e3e4ea;--accent:53,92,222;
--cam:#e0861a;--refined:#1f9d6b;--label:#3b7ddd;--network:#8a4fd6;--given:#d2559f;--miss:214,64,80}
@media(prefers-color-scheme:dark){:root{--bg:#121317;--card:#1b1d23;--text:#e9eaef;--soft:#9a9fad;--line:#2d3038;--accent:120,150,255;
--cam:#f2a444;--refined:#3cc48c;--label:#69a4f5;--network:#b388f2;--given:#ee86c0;--miss:240,100,110}}
*{box-sizing:border-box}
html{scroll-behavior:smooth;scroll-padding-top:1rem}
body{margin:0;background:var(--bg);color:var(--text);
font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
header,main{max-width:1180px;margin:0 auto;padding:0 24px}
header{padding-top:40px}
h1{font-size:32px;line-height:1.2;margin:.1em 0;letter-spacing:-.02em;overflow-wrap:anywhere}
header p{margin:.2em 0;color:var(--soft)}
.brand{font-weight:700;letter-spacing:.06em;text-transform:uppercase;font-size:12px;color:rgb(var(--accent))!important}
nav{display:flex;flex-wrap:wrap;gap:6px 18px;margin-top:18px}
nav a{color:var(--soft);text-decoration:none;border-bottom:1px solid var(--line)}
nav a:hover,nav a:focus{color:var(--text);border-color:currentColor}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:22px 26px 26px;margin:24px 0}
h2{font-size:19px;margin:0 0 14px;letter-spacing:-.01em}
h3{font-size:14px;margin:24px 0 6px;color:var(--soft);text-transform:uppercase;letter-spacing:.05em}
h4{font:12px/1.4 ui-monospace,SFMono-Regular,Menlo,monospace;color:var(--soft);margin:16px 0 6px;overflow-wrap:anywhere}
small{color:var(--soft);font-weight:400;font-size:12px}
.hint{color:var(--soft);font-size:13px;max-width:75ch;margin:10px 0}
.note{border-left:3px solid var(--cam);padding:4px 12px;color:var(--soft);overflow-wrap:anywhere}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:7px 18px 7px 0;border-bottom:1px solid var(--line);vertical-align:baseline}
thead th{color:var(--soft);font-size:13px;font-weight:600}
tbody tr:last-child>*{border-bottom:0}
th small,td small{display:block}
.scores{min-width:min(100%,520px)}
.scores td{padding-right:42px}
.scores b{font-size:24px;font-weight:600;letter-spacing:-.02em}
.scores .best b{color:rgb(var(--accent))}
.scores th[scope=row]{font-weight:600;padding-right:42px}
.none{color:var(--soft)}
.swatch{display:inline-block;width:12px;height:12px;border-radius:3px;background:var(--tone);margin-right:8px;vertical-align:-1px}
.swatch.dashed{background:repeating-linear-gradient(90deg,var(--tone) 0 3px,transparent 3px 5px)}
.swatch.striped{background:repeating-linear-gradient(135deg,#ddd 0 3px,#888 3px 6px)}
.heat{display:inline-block;width:80px;height:10px;border-radius:3px;margin:0 4px}
ul{list-style:none;padding:0;margin:8px 0}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:13px}
.plain{font-size:13px;color:var(--soft)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:20px 36px;align-items:start}
figure{margin:0;min-width:0}
figcaption{font-size:13px;font-weight:600;margin-bottom:6px}
svg{width:100%;height:auto;display:block;max-width:600px}
svg text{font-size:12px;fill:var(--soft)}
svg .name{fill:var(--text)}
svg .value{font-size:9px}
svg .grid{stroke:var(--line)}
svg .line{fill:none;stroke-width:2.2;stroke-linejoin:round;stroke-linecap:round}
svg .mark{stroke:var(--card);stroke-width:2}
.row{border-top:1px solid var(--line)}
h3+.row,.hint+.row{border-top:0}
.strip{display:grid;grid-template-columns:repeat(auto-fill,minmax(128px,1fr));gap:10px;padding-bottom:14px}
.pic img{display:block;width:100%;border-radius:6px;cursor:zoom-in;background:var(--line)}
.pic figcaption{font-weight:400;margin:4px 0 0;font-size:12px;color:var(--soft);overflow-wrap:anywhere}
.pic b{color:var(--text);float:right}
.scroll{overflow-x:auto}
.matrix{font-size:12px;border-spacing:2px;border-collapse:separate}
.matrix th,.matrix td{border:0;padding:0;vertical-align:middle}
.matrix td{width:40px;height:32px;text-align:center;border-radius:4px}
.matrix tbody th{padding-right:10px;text-align:right;font-weight:400}
.matrix thead th{font-weight:400;vertical-align:bottom;text-align:center}
.matrix thead span{writing-mode:vertical-rl;transform:rotate(180deg)}
.hit{background:rgba(var(--accent),calc(.06 + .6*var(--v)))}
.miss{background:rgba(var(--miss),calc(.03 + 1.2*var(--v)))}
.times{width:100%}
.wide{width:38%}
.bar{display:block;height:10px;border-radius:3px;background:rgb(var(--accent));min-width:2px}
tfoot th,tfoot td{border:0;border-top:1px solid var(--line);font-weight:600}
details{border-bottom:1px solid var(--line);padding:8px 0}
details:last-child{border:0}
summary{cursor:pointer;font-weight:600}
.config{font-size:13px;margin:8px 0}
.config th{font-weight:400;color:var(--soft);padding-right:28px}
code,pre{font:12px/1.5 ui-monospace,SFMono-Regular,Menlo,monospace;overflow-wrap:anywhere}
pre{overflow-x:auto}
.unseen{position:absolute;clip-path:inset(50%);width:1px;height:1px;overflow:hidden}
dialog{border:0;border-radius:12px;background:var(--card);color:var(--text);padding:16px;max-width:92vw;max-height:92vh}
dialog::backdrop{background:rgba(0,0,0,.7)}
dialog img{display:block;width:min(80vw,80vh);max-height:80vh;object-fit:contain;image-rendering:auto}
dialog p{margin:8px 0 0;font-size:13px}
@media print{section{break-inside:avoid-page;border:0;padding:0}nav{display:none}}
""".replace("\n", "")

SCRIPT = """
const box=document.querySelector('dialog'),large=box.querySelector('img'),text=box.querySelector('p');
document.querySelectorAll('.pic img').forEach(small=>{
small.tabIndex=0;
const show=()=>{large.src=small.src;large.alt=small.alt;text.textContent=small.alt;box.showModal()};
small.addEventListener('click',show);
small.addEventListener('keydown',event=>{if(event.key==='Enter')show()})});
box.addEventListener('click',()=>box.close());
""".replace("\n", "")
