//! The font of pictures: a subset of DejaVu Sans (LICENSE-DejaVu), because a server has no fonts.

use std::sync::OnceLock;

use plotters::style::{FontDesc, FontFamily, FontStyle, register_font};

/// Family name under which plotters knows it.
const FAMILY: &str = "hardmax";

/// The font at a size in pixels; the height is that of a line.
pub(super) fn font(size: f64) -> FontDesc<'static> {
    static REGISTERED: OnceLock<()> = OnceLock::new();
    REGISTERED.get_or_init(|| {
        let bytes = include_bytes!("DejaVuSans-subset.ttf");
        assert!(register_font(FAMILY, FontStyle::Normal, bytes).is_ok(), "the font in the program is a font; else it is a bug");
    });
    FontDesc::new(FontFamily::Name(FAMILY), size, FontStyle::Normal)
}

/// Width of a line of text in pixels.
pub(super) fn width(text: &str, size: f64) -> f64 {
    // plotters rounds to whole pixels: measure large.
    let ((left, _), (right, _)) = font(size * 10.0).layout_box(text).unwrap_or_default();
    f64::from(right - left) / 10.0
}
