//! Figures as a whole: both forms are there, and show what they are given.

use super::*;

fn chart() -> Chart {
    let line = |slope: f64| (0..50).map(|i| (f64::from(i), (-slope * f64::from(i)).exp())).collect::<Vec<_>>();
    let series = |i: usize, name: &str, form: Form| Series { name: name.into(), colour: Colour::nth(i), form };
    Chart {
        title: "loss & <gap>".into(),
        x: Axis::linear("step"),
        y: Axis::log("τ ≤ 1"),
        series: vec![
            series(0, "", Form::Band(line(0.1).into_iter().map(|(x, y)| (x, 0.8 * y, 1.3 * y)).collect())),
            series(0, "ste", Form::Line(line(0.1))),
            series(1, "soft", Form::Dashed(line(0.05), Dash::Mixed)),
            series(2, "points", Form::Dots(vec![(10.0, 0.5), (20.0, f64::NAN), (30.0, -1.0), (40.0, 0.2)])),
        ],
        legend: Legend::Right,
    }
}

fn heat() -> HeatMap {
    HeatMap {
        title: "raw_topk".into(),
        x_label: "step".into(),
        y_label: "expert".into(),
        x_ends: ("0".into(), "3000".into()),
        columns: (0..40).map(|t| (0..8).map(|e| if (t + e) % 3 == 0 { f64::NAN } else { f64::from(t * e) / 40.0 }).collect()).collect(),
        most: 8.0,
    }
}

fn dots() -> DotPlot {
    let at = |middle: f64| Some(Dot::At { middle, low: 0.5 * middle, high: 2.0 * middle });
    let series = |i: usize, name: &str, dots| DotSeries { name: name.into(), colour: Colour::nth(i), dots };
    DotPlot {
        title: "quality".into(),
        names: ["above", "and below", "nothing", "a control"].map(String::from).into(),
        set_off: 3,
        columns: vec![
            DotColumn {
                axis: Axis::log("bias"),
                series: vec![series(4, "one token", vec![at(0.1), Some(Dot::Below(0.2)), None, at(1.0)])],
            },
            DotColumn { axis: Axis::log("loss").from_to(0.1, 1.0), series: vec![series(5, "", vec![at(0.0), at(0.5), None, at(1e-9)])] },
        ],
    }
}

fn figure() -> Figure {
    Figure {
        title: "All".into(),
        panel: (420.0, 280.0),
        columns: 2,
        panels: vec![Panel::Chart(chart()), Panel::Heat(heat()), Panel::Chart(Chart::default()), Panel::Dots(dots())],
        bar: Some(ColourBar { label: "load / fair".into(), most: 8.0 }),
    }
}

#[test]
fn the_svg_is_well_formed_and_says_everything() {
    let laid = figure().lay_out();
    let svg = svg::write(&laid.canvas, laid.size);
    assert!(svg.starts_with("<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"904\" height=\"590\"") && svg.ends_with("</svg>\n"));
    let texts = ["loss &amp; &lt;gap&gt;", "τ ≤ 1", ">ste<", ">soft<", "raw_topk", ">3000<", "load / fair", ">All<"];
    for text in texts.into_iter().chain([">quality<", ">and below<", ">a control<", ">bias<", ">one token<"]) {
        assert!(svg.contains(text), "{text}");
    }
    let of_rows = 2 + 2 + 1;
    assert_eq!(svg.matches("<circle").count(), 2 + 1 + of_rows, "two dots have no place; each legend has one");
    assert_eq!(svg.matches("<polygon").count(), 1 + 1, "a tint, and a control that is beyond its axis");
    assert!(!svg.contains("NaN") && !svg.contains("inf"));
}

#[test]
fn the_png_has_the_size_and_the_colours() {
    let laid = figure().lay_out();
    let bytes = raster::png(&laid.canvas, laid.size).unwrap();
    let mut reader = png::Decoder::new(std::io::Cursor::new(bytes)).read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut pixels).unwrap();
    assert_eq!((info.width, info.height, info.color_type), (904, 590, png::ColorType::Rgb));
    let has = |rgb: [u8; 3]| pixels.chunks_exact(3).any(|pixel| pixel == rgb);
    assert_eq!(pixels[..3], [255; 3], "paper");
    assert!(has(Colour::nth(0).rgb) && has(Colour::nth(1).rgb), "curves");
    assert!(has(Colour::heat(0.0).rgb) && has(Colour::heat(1.0 - 0.5 / 48.0).rgb), "the heat scale");
    let dark = |from: usize, to: usize| pixels.chunks_exact(904 * 3).skip(from).take(to - from).flatten().filter(|&&v| v < 80).count();
    assert!(dark(8, 28) > 100, "the title is drawn: the font is there");
}

#[test]
fn names_do_not_lie_on_one_another() {
    let names: Vec<String> = (0..30).map(|i| format!("estimator_{i}")).collect();
    let dots = vec![Some(Dot::Below(1.0)); names.len()];
    let series = vec![DotSeries { name: String::new(), colour: Colour::INK, dots }];
    let plot = DotPlot { names, set_off: 30, columns: vec![DotColumn { axis: Axis::log("x"), series }], ..DotPlot::default() };
    let mut canvas = Canvas::default();
    plot.draw(&mut canvas, Area { left: 0.0, top: 0.0, width: 900.0, height: plot.height() });
    let text = |mark: &marks::Mark| match mark {
        marks::Mark::Text { at, text, size, .. } if text.starts_with("estimator") => Some((at.0 - font::width(text, *size), at.1, *size)),
        _ => None,
    };
    let names: Vec<(f64, f64, f64)> = canvas.marks.iter().filter_map(text).collect();
    assert_eq!(names.len(), 30);
    assert!(names.windows(2).all(|pair| pair[1].1 - pair[0].1 > pair[0].2), "rows are further apart than their names are high");
    assert!(names.iter().all(|(left, ..)| *left >= 0.0), "names are within the picture");
}

#[test]
fn both_files_are_written() {
    let folder = std::env::temp_dir().join(format!("hardmax-plot-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    figure().save(&folder.join("picture")).unwrap();
    let size = |name: &str| std::fs::metadata(folder.join(name)).map_or(0, |data| data.len());
    assert!(size("picture.svg") > 1000 && size("picture.png") > 1000);
    assert!(figure().save(&folder.join("no such folder/picture")).is_err());
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn a_grid_names_what_there_is_room_for() {
    let names = |n: usize| (0..n).map(|i| format!("name {i}")).collect::<Vec<_>>();
    let grid = Grid {
        title: "grid".into(),
        x_label: "across".into(),
        y_label: "down".into(),
        columns: names(40),
        rows: names(3),
        values: vec![vec![0.5; 40], vec![f64::NAN; 40], vec![9.0; 40]],
        most: 1.0,
    };
    let laid = Figure::single((400.0, 200.0), Panel::Grid(grid)).lay_out();
    let svg = svg::write(&laid.canvas, laid.size);
    assert!([">grid<", ">across<", ">down<", ">name 2<"].iter().all(|text| svg.contains(text)));
    let shown = svg.matches(">name ").count();
    assert!((6..15).contains(&shown), "{shown} names of 43");
    assert!(!svg.contains("NaN"));
    assert!(
        Figure::single((100.0, 100.0), Panel::Grid(Grid::default())).lay_out().canvas.marks.len() < 10,
        "nothing is no picture of something"
    );
}
