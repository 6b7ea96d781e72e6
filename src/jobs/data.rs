//! Files that a client names: only such as an operator lets it read.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// The files `paths` of `field`, as they are called without links and dots. Relative ones are below the first folder.
///
/// # Errors
/// `InvalidArgument` on `FIELD[N]` where one is not below a folder, or is no file; `FailedPrecondition` where there is no folder.
pub(super) fn files(folders: &[PathBuf], field: &str, paths: &[String]) -> Result<Vec<PathBuf>> {
    let Some(first) = folders.first() else {
        let message = "this server reads no files for tuning: send the text, or start the server with --tuning-data DIR";
        return Err(Error::FailedPrecondition(message.into()));
    };
    paths.iter().enumerate().map(|(index, path)| file(folders, &first.join(path)).map_err(|why| wrong(field, index, path, why))).collect()
}

fn file(folders: &[PathBuf], path: &Path) -> std::result::Result<PathBuf, &'static str> {
    const NONE: &str = "is no file below the folders of --tuning-data";
    // What is elsewhere is told like what is nowhere: a client learns nothing of the rest of the disk.
    let found = path.canonicalize().map_err(|_| NONE)?;
    let below = folders.iter().any(|folder| found.starts_with(folder));
    if below && found.is_file() { Ok(found) } else { Err(NONE) }
}

fn wrong(field: &str, index: usize, path: &str, why: &str) -> Error {
    Error::invalid(format!("{field}[{index}]"), format!("'{path}' {why}"))
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink, slice};

    use super::*;

    #[test]
    fn only_files_below_the_folders_are_read() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path().canonicalize().unwrap();
        let (open, closed) = (root.join("open"), root.join("closed"));
        fs::create_dir_all(open.join("deep")).unwrap();
        fs::create_dir(&closed).unwrap();
        fs::write(open.join("deep/a.txt"), "a").unwrap();
        fs::write(closed.join("secret.txt"), "s").unwrap();
        symlink(closed.join("secret.txt"), open.join("link.txt")).unwrap();
        symlink(&closed, open.join("out")).unwrap();
        symlink(open.join("deep/a.txt"), closed.join("in.txt")).unwrap();
        let ask = |path: &str| files(slice::from_ref(&open), "config.data.paths", &["deep/a.txt".into(), path.into()]);
        let absolute = open.join("deep/a.txt").display().to_string();
        for good in ["deep/a.txt", "deep/../deep/./a.txt", &absolute, closed.join("in.txt").to_str().unwrap()] {
            assert_eq!(ask(good).unwrap()[1], open.join("deep/a.txt"), "{good}");
        }
        let elsewhere = closed.join("secret.txt").display().to_string();
        for bad in
            ["", "deep", "none.txt", "link.txt", "out/secret.txt", "../closed/secret.txt", "../opener", "a\0b", "/etc/passwd", &elsewhere]
        {
            let error = ask(bad).unwrap_err().to_string();
            assert_eq!(error, format!("config.data.paths[1]: '{bad}' is no file below the folders of --tuning-data"));
        }
        assert!(matches!(files(&[], "x", &[]), Err(Error::FailedPrecondition(_))));
    }
}
